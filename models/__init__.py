"""Model families, their networks, files and pipelines, and the memory that they need."""
