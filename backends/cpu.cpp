// w4a4_linear and w4a4_conv2d of kernels.py as one C++ kernel, in three steps:
//
//     1 Input       x quantized, once: the codes of every pixel as bytes, padded: (N, H + 2p, W + 2p, C). A window of a
//                   convolution is kh runs of kw C codes, so windows are read where they lie (no im2col); a linear layer is
//                   the case N = T, H = W = 1.
//     2 Projection  low = x' A^T, (T, Rp): Rp is the rank, padded with zeros to whole lanes.
//     3 Product     y = s_x s_w (X W^T) + bias + low B^T, rounded once to the type of x.
//
//     panel         WIDTH output channels, unpacked (m q) and interleaved: (K / 4, WIDTH, 4); a lane of 32 bits holds 4 codes.
//     tile          MR rows x WIDTH columns in registers: acc += lane(row) . lane(panel), for codes, bfloat16 or float32 alike.
//                   Its sums are scaled and the branch is added before they leave the registers.
//
// Every output is summed in one order, whatever the batch and the threads; sums of codes are exact int32. Both units multiply
// unsigned by signed bytes:
//
//     VNNI     rows hold m q + 128; 128 times the sum of each weight row is taken off again.
//     AVX2     rows hold q and, apart, m, because the unit's pairs of products saturate at int16; the panel is unsigned, m q + 128.
//              A chunk of at most 16 codes is summed in int16 (240 x 8 fits 17 times) and then multiplied by m. 128 times the sum of
//              each row is taken off again.
//              Activations in 8 bits (group_x 0) need neither m nor chunks: their codes and m q of the weight are int16 here, a
//              lane holds 2 of each, and the sums are int32 at once: twice the instructions for a code, but none for multipliers.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#ifndef _OPENMP
#error "without -fopenmp at::parallel_for runs on one thread"
#endif

using at::Tensor;
using std::optional;

#ifdef __AVX512VNNI__
constexpr bool VNNI = true;
constexpr int LANES = 16, NR = 4;  // 24 accumulators of 32 registers
#else
constexpr bool VNNI = false;
constexpr int LANES = 8, NR = 2;  // 12 of 16
#endif
constexpr int MR = 6, WIDTH = NR * LANES;
constexpr int64_t BLOCK = 1024;  // values of a weight row that are unpacked at a time, in the L1 cache
constexpr float TINY = 1e-30f, MAGIC = 12582912.f;  // 1.5 2^23: adding it rounds to an integer

typedef int32_t V __attribute__((vector_size(4 * LANES)));  // a register; casts between vectors keep the bits
typedef float F __attribute__((vector_size(4 * LANES)));
typedef uint16_t Words __attribute__((vector_size(2 * LANES)));
typedef int32_t V8 __attribute__((vector_size(32)));
typedef float F8 __attribute__((vector_size(32)));
#define UNROLL _Pragma("GCC unroll 16")  // indices become constants, so that accumulators are registers

template <class To, class From> static inline To bits(From x) { return __builtin_bit_cast(To, x); }
template <class To> static inline To load(const void* p) {
  To v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline V broadcast(int32_t a) { return V{} + a; }
static inline int32_t largest(V8 v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0b10110001)));
}

struct Grid {  // of activations (quant.py): codes, largest multiplier, and how rows hold m q or, on AVX2, q
  int qmin, qmax, most, offset, bytes;
};
constexpr Grid FOUR_BITS{-8, 7, 16, VNNI ? 128 : 0, 1}, EIGHT_BITS{-128, 127, 1, VNNI ? 128 : 0, VNNI ? 1 : 2};

// dot: acc += a . b in every lane. zip: a0 b0 a1 b1 .. in two registers. look_up: table[byte] for every byte.
#ifdef __AVX512VNNI__
struct Float {  // lane of one float32
  static V dot(V acc, V a, V b) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc); }
};
struct Codes {  // lane of four codes
  static V dot(V acc, V a, V b) { return (V)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
};
using Whole = Codes;  // sums over all of K at once
static inline void zip(V a, V b, V* out) {
  const V low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  out[0] = (V)_mm512_permutex2var_epi32((__m512i)a, (__m512i)low, (__m512i)b);
  out[1] = (V)_mm512_permutex2var_epi32((__m512i)a, (__m512i)(low + 8), (__m512i)b);
}
static inline V look_up(__m128i table, V i) { return (V)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)i); }
#else
struct Float {
  static V dot(V acc, V a, V b) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc); }
};
struct Codes {  // sums of two products in int16
  static V first(V a, V b) { return (V)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
  static V dot(V acc, V a, V b) { return (V)_mm256_add_epi16((__m256i)acc, (__m256i)first(a, b)); }
};
struct Whole {  // lane of two words, sums in int32
  static V dot(V acc, V a, V b) { return acc + (V)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
};
static inline void zip(V a, V b, V* out) {
  const __m256i low = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b), high = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  out[0] = (V)_mm256_permute2x128_si256(low, high, 0x20), out[1] = (V)_mm256_permute2x128_si256(low, high, 0x31);
}
static inline V look_up(__m128i table, V i) { return (V)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)i); }
#endif
#ifdef __AVX512BF16__
struct Bfloat {  // lane of two bfloat16
  static V dot(V acc, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

static inline float to_float(float x) { return x; }
static inline float to_float(at::BFloat16 x) { return bits<float>((uint32_t)x.x << 16); }
static inline float to_float(at::Half x) { return _cvtsh_ss(x.x); }
static inline void store(float* y, float x) { *y = x; }
static inline void store(at::BFloat16* y, float x) {  // to nearest even
  uint32_t u = bits<uint32_t>(x);
  y->x = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline void store(at::Half* y, float x) { y->x = _cvtss_sh(x, 0); }
static inline void store(float* y, F x) { memcpy(y, &x, sizeof x); }
static inline void store(at::BFloat16* y, F x) {
  const V u = (V)x, even = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const auto w = __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? broadcast(0x7fc0) : even, Words);
  memcpy(y, &w, sizeof w);
}
static inline void store(at::Half* y, F x) {
  for (int i = 0; i < LANES; i++) store(y + i, x[i]);
}
// Two registers; `stream`: past the caches, to a multiple of 64 bytes
template <class T> static inline void store(T* y, F a, F b, bool) { store(y, a), store(y + LANES, b); }
#ifdef __AVX512BF16__
static inline void store(at::BFloat16* y, F a, F b, bool stream) {  // (the unit takes subnormal numbers for zero)
  const __m512i v = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  stream ? _mm512_stream_si512((__m512i*)y, v) : _mm512_storeu_si512((__m512i*)y, v);
}
#endif
template <class T, class Low> static inline Low rounded(float x) {  // to T, which Low holds exactly
  T v;
  store(&v, x);
  return Low(to_float(v));
}

template <class T, class Low> static void convert(const T* from, int64_t n, Low* to) {
  if constexpr (std::is_same_v<T, Low>) std::copy_n(from, n, to);
  else
    for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

// ---------------------------------------------------------------------------------------------------------- tile

struct Rows {  // where windows lie: `runs` pieces of `steps` lanes, `stride` bytes apart
  const char* data;
  int64_t runs, steps, stride;
};

// acc += M rows . panel of N registers of columns
template <class Dot, int M, int N>
[[gnu::always_inline]] static inline void tile(const char* const row[MR], const Rows& in, const V* panel, V acc[M][N]) {
  for (int64_t run = 0; run < in.runs; run++) {
    const int32_t* a[M];
    UNROLL for (int i = 0; i < M; i++) a[i] = (const int32_t*)(row[i] + run * in.stride);
    for (int64_t k = 0; k < in.steps; k++, panel += N) {
      V b[N];
      UNROLL for (int j = 0; j < N; j++) b[j] = panel[j];
      UNROLL for (int i = 0; i < M; i++) {
        const V ai = broadcast(a[i][k]);
        UNROLL for (int j = 0; j < N; j++) acc[i][j] = Dot::dot(acc[i][j], ai, b[j]);
      }
    }
  }
}

struct Windows {  // MR of them: codes, multipliers of their chunks (AVX2), low, scales
  const char *codes[MR], *mult[MR], *low[MR];
  int32_t minus[MR];  // AVX2: what the offset of the panel added
  float scale[MR];
  int64_t count;  // windows that exist
};
struct Panel {  // WIDTH columns: codes, what takes the offset of rows off, B, scales, bias
  const V *codes, *minus, *B;
  const float *scale, *bias;
  int64_t width;  // columns that exist
  bool stream;  // outputs go past the caches
};

#ifndef __AVX512VNNI__
// acc = M rows . panel, STEPS lanes to a chunk. As many rows at a time as let their sums and a chunk's panel stay in registers; they
// meet BATCH chunks, whose panel stays in the L1 cache for the rows after them.
template <int STEPS, int M> static void chunked(const Windows& w, const Rows& in, const Rows& in_mult, const V* codes, V acc[M][NR]) {
  constexpr int64_t R = M > 2 && STEPS == 2 ? 3 : 2, BATCH = 512 / (STEPS * NR);
  memset(acc, 0, M * NR * sizeof(V));
  for (int64_t run = 0; run < in.runs; run++)
    for (int64_t begin = 0; begin < in_mult.steps; begin += BATCH) {
      const int64_t n = std::min(BATCH, in_mult.steps - begin);
      for (int64_t i0 = 0; i0 < M; i0 += R) {
        const int32_t *a[R], *m[R];
        V total[R][NR];
        UNROLL for (int i = 0; i < R; i++) {
          a[i] = (const int32_t*)(w.codes[i0 + i] + run * in.stride) + begin * STEPS;
          m[i] = (const int32_t*)(w.mult[i0 + i] + run * in_mult.stride) + begin;
          UNROLL for (int j = 0; j < NR; j++) total[i][j] = acc[i0 + i][j];
        }
        const V* panel = codes;
        for (int64_t chunk = 0; chunk < n; chunk++, panel += STEPS * NR) {
          V b[STEPS][NR];
          UNROLL for (int k = 0; k < STEPS; k++) {
            UNROLL for (int j = 0; j < NR; j++) b[k][j] = panel[k * NR + j];
          }
          UNROLL for (int i = 0; i < R; i++) {
            V sum[NR];
            UNROLL for (int k = 0; k < STEPS; k++) {
              const V ai = broadcast(a[i][chunk * STEPS + k]);
              UNROLL for (int j = 0; j < NR; j++) sum[j] = k == 0 ? Codes::first(b[k][j], ai) : Codes::dot(sum[j], b[k][j], ai);
            }
            const __m256i mi = (__m256i)broadcast(m[i][chunk]);
            UNROLL for (int j = 0; j < NR; j++) total[i][j] += (V)_mm256_madd_epi16((__m256i)sum[j], mi);
          }
        }
        UNROLL for (int i = 0; i < R; i++) {
          UNROLL for (int j = 0; j < NR; j++) acc[i0 + i][j] = total[i][j];
        }
      }
      codes += n * STEPS * NR;
    }
}
#endif

// M x WIDTH outputs: sums of codes, scaled, bias, branch, rounded to T. AVX2 with multipliers: STEPS lanes in a chunk, else 0.
template <class T, class Dot, int STEPS, int M>
static void outputs(const Windows& w, const Panel& p, const Rows& in, const Rows& in_mult, const Rows& in_low, T* y, int64_t O) {
  V acc[M][NR];
  if constexpr (STEPS == 0) {
    UNROLL for (int i = 0; i < M; i++) {
      UNROLL for (int j = 0; j < NR; j++) acc[i][j] = p.minus[j];
    }
    tile<Whole, M, NR>(w.codes, in, p.codes, acc);
  }
#ifndef __AVX512VNNI__
  else
    chunked<STEPS, M>(w, in, in_mult, p.codes, acc);
#endif
  UNROLL for (int i = 0; i < M; i++) {
    UNROLL for (int j = 0; j < NR; j++) {
      const F sum = __builtin_convertvector(acc[i][j] - w.minus[i], F);
      acc[i][j] = (V)(sum * w.scale[i] * load<F>(p.scale + j * LANES) + load<F>(p.bias + j * LANES));
    }
  }
  if (in_low.steps) tile<Dot, M, NR>(w.low, in_low, p.B, acc);
  UNROLL for (int i = 0; i < M; i++) {
    T* to = y + i * O;
    if (i >= w.count) continue;
    if (p.width == WIDTH) {
      UNROLL for (int j = 0; j < NR; j += 2) store(to + j * LANES, (F)acc[i][j], (F)acc[i][j + 1], p.stream);
    } else {
      float row[WIDTH];  // a copy: an array that a variable indexes lies in memory
      UNROLL for (int j = 0; j < NR; j++) store(row + j * LANES, (F)acc[i][j]);
      for (int64_t j = 0; j < p.width; j++) store(to + j, row[j]);
    }
  }
}

template <class T, class Dot, int M> static auto outputs_of(int64_t chunk) {
  if constexpr (VNNI) return outputs<T, Dot, 0, M>;
  else
    return chunk == 0 ? outputs<T, Dot, 0, M> : chunk == 16 ? outputs<T, Dot, 4, M> : outputs<T, Dot, 2, M>;
}

// ---------------------------------------------------------------------------------------------------- geometry

struct Shape {
  int64_t N, H, W, I, kh, kw, sh, sw, ph, pw;
  int64_t Hp() const { return H + 2 * ph; }
  int64_t Wp() const { return W + 2 * pw; }
  int64_t Ho() const { return (Hp() - kh) / sh + 1; }
  int64_t Wo() const { return (Wp() - kw) / sw + 1; }
  int64_t T() const { return N * Ho() * Wo(); }
  int64_t padded(int64_t p) const {  // input pixel p in the padded pictures
    return ph || pw ? ((p / (H * W)) * Hp() + p / W % H + ph) * Wp() + p % W + pw : p;
  }
  void windows(int64_t t, int64_t pixel[MR]) const {  // where those of outputs t.. begin, in the padded pictures
    int64_t n = t / (Ho() * Wo()), y = t / Wo() % Ho(), x = t % Wo();
    for (int i = 0; i < MR; i++) {
      pixel[i] = (n * Hp() + y * sh) * Wp() + x * sw;
      if (t + i + 1 >= T()) continue;  // the last one again and again: these outputs are not stored
      if (++x == Wo()) x = 0, ++y == Ho() ? y = 0, n++ : 0;
    }
  }
  Rows rows(const void* data, int64_t pixel_bytes) const {
    return {(const char*)data, kh, kw * pixel_bytes / 4, Wp() * pixel_bytes};
  }
};

// -------------------------------------------------------------------------------------------------- quantize x

template <class T>
static void smoothed(const T* x, const float* inv, int64_t I, float* out) {
  if (inv)
    for (int64_t k = 0; k < I; k++) out[k] = to_float(x[k]) * inv[k];
  else
    for (int64_t k = 0; k < I; k++) out[k] = to_float(x[k]);
}

// quant.rotate of every block of 16: pairs 8 apart, then 4, 2 and 1, become sum and difference
static void rotate(float* x, int64_t I) {
  const V8 four{4, 5, 6, 7, 0, 1, 2, 3}, two{2, 3, 0, 1, 6, 7, 4, 5}, one{1, 0, 3, 2, 5, 4, 7, 6};
  const F8 sign4{1, 1, 1, 1, -1, -1, -1, -1}, sign2{1, 1, -1, -1, 1, 1, -1, -1}, sign1{1, -1, 1, -1, 1, -1, 1, -1};
  for (int64_t k = 0; k < I; k += 16) {
    const F8 low = load<F8>(x + k), high = load<F8>(x + k + 8);
    F8 v[2] = {low + high, low - high};
    UNROLL for (int i = 0; i < 2; i++) {
      v[i] = __builtin_shuffle(v[i], four) + v[i] * sign4;
      v[i] = __builtin_shuffle(v[i], two) + v[i] * sign2;
      v[i] = (__builtin_shuffle(v[i], one) + v[i] * sign1) * 0.25f;
    }
    memcpy(x + k, v, sizeof v);
  }
}

static float scale_of(float bound, int most) {
  float s = bound * (1.f / most);
  return s < INFINITY ? std::max(s, TINY) : NAN;
}

// quant.step_bound of every group (a multiple of 8); returns the largest. NaN wins every maximum, as bits of a positive number do.
static float bounds(const float* x, int64_t G, int64_t group, const Grid& grid, float* b) {
  const F8 up = F8{} + float(1 / (grid.qmax + 0.5)), down = F8{} + float(1 / (0.5 - grid.qmin));
  V8 all{};
  for (int64_t g = 0; g < G; g++) {
    V8 most{};
    for (int64_t k = 0; k < group; k += 8) {
      const F8 v = load<F8>(x + g * group + k);
      const V8 bound = (V8)(v * (v < 0 ? down : up)) & 0x7fffffff;
      most = bound > most ? bound : most;
    }
    b[g] = bits<float>(largest(most));
    all = most > all ? most : all;
  }
  return bits<float>(largest(all));
}

// Bounds of groups -> their m, in place, and 1 / (s m); both in arrays of a multiple of 8
static void multipliers(float* b, float s, int64_t G, float* inv) {
  for (int64_t g = 0; g < G; g += 8) {
    F8 m = (F8)_mm256_ceil_ps((__m256)(load<F8>(b + g) / s));
    m = m < 1 ? F8{} + 1 : m;
    m = m > 16 ? F8{} + 16 : m;
    const F8 i = 1 / (s * m);
    memcpy(b + g, &m, sizeof m), memcpy(inv + g, &i, sizeof i);
  }
}

// The first n codes of a row, as rows hold them (Code: bytes or words); next: the next row of x, not read yet. Returns the sum of m q
// (AVX2).
template <class Vec, class Float, class Code>
static int32_t quantize(const float* x, const float* m, const float* inv, int64_t n, int64_t group, const Grid& grid, void* to,
                        const char* next) {
  constexpr int64_t step = sizeof(Vec) / 4;
  typedef Code Out __attribute__((vector_size(step * sizeof(Code))));
  const Vec qmin = Vec{} + grid.qmin, qmax = Vec{} + grid.qmax, offset = Vec{} + grid.offset;
  Code* const out = (Code*)to;
  Vec sums{};
  for (int64_t k0 = 0; k0 < n; k0 += group, m++, inv++) {
    __builtin_prefetch(out + k0 + 4096, 1);  // stores would wait for their cache lines
    __builtin_prefetch(next + 2 * k0);  // (bfloat16 rows are not waited for)
    for (int64_t k = k0; k < std::min(k0 + group, n); k += step) {
      Vec q = (Vec)(load<Float>(x + k) * *inv + MAGIC) - bits<int32_t>(MAGIC);
      q = q < qmin ? qmin : q;
      q = q > qmax ? qmax : q;
      const Out code = __builtin_convertvector(q * (VNNI ? (int32_t)*m : 1) + offset, Out);
      memcpy(out + k, &code, sizeof code);
      if constexpr (!VNNI) sums += q * (int32_t)*m;
    }
  }
  int32_t sum = 0;
  for (int i = 0; i < step && !VNNI; i++) sum += sums[i];
  return sum;
}

// ------------------------------------------------------------------------------------------------------ panels

using Table = std::array<std::array<int8_t, 16>, 16>;
static Table table_of(int offset) {  // m q + offset for n = m - 1, u = q + 8
  Table table;
  for (int n = 0; n < 16; n++)
    for (int u = 0; u < 16; u++) table[n][u] = (n + 1) * (u - 8) + offset;
  return table;
}
static const Table SIGNED = table_of(0), UNSIGNED = table_of(128);

// Values k..stop of a row from the low (SHIFT 0) or high (4) nibbles of p[k]; returns stop.
template <int SHIFT> static inline int64_t nibbles(const uint8_t* p, const int8_t* table, int64_t k, int64_t stop, int8_t* out) {
  const __m128i products = load<__m128i>(table);
  for (; k + (int64_t)sizeof(V) <= stop; k += sizeof(V)) {
    const V m_q = look_up(products, load<V>(p + k) >> SHIFT & 0x0F0F0F0F);
    memcpy(out + k, &m_q, sizeof m_q);
  }
  for (; k < stop; k++) out[k] = table[p[k] >> SHIFT & 15];
  return k;
}

// Values k..stop, whole groups, of weight row o -> what `tables` has for them. Byte j of a row holds values j (low nibble) and j + K/2 (high).
static void unpack(const uint8_t* codes, const uint8_t* mult, int64_t o, int64_t K, int64_t group, int64_t k, int64_t stop,
                   const Table& tables, int8_t* out) {
  const uint8_t* p = codes + o * (K / 2);
  out -= k;
  for (int64_t at = (o * K + k) / group; k < stop; at++) {
    const int8_t* table = tables[mult[at / 2] >> 4 * (at % 2) & 15].data();
    const int64_t end = k + group;
    if (k < K / 2) k = nibbles<0>(p, table, k, std::min(end, K / 2), out);
    if (end > K / 2) k = nibbles<4>(p - K / 2, table, k, end, out);
  }
}

// LANES rows of `lanes` lanes -> to[k * step]: lane k of every row. Each round of zips rotates the bits of an element's index (row,
// column) by one; after log2(LANES) rounds rows and columns have changed places.
static void interleave(const void* rows, int64_t lanes, V* to, int64_t step) {
  const int32_t* from = (const int32_t*)rows;
  int64_t k = 0;
  for (; k + LANES <= lanes; k += LANES) {
    V a[LANES], b[LANES];
    UNROLL for (int i = 0; i < LANES; i++) a[i] = load<V>(from + i * lanes + k);
    UNROLL for (int round = 1; round < LANES; round *= 2) {
      UNROLL for (int i = 0; i < LANES / 2; i++) zip(a[i], a[i + LANES / 2], b + 2 * i);
      UNROLL for (int i = 0; i < LANES; i++) a[i] = b[i];
    }
    UNROLL for (int i = 0; i < LANES; i++) to[(k + i) * step] = a[i];
  }
  for (; k < lanes; k++)
    for (int i = 0; i < LANES; i++) to[k * step][i] = from[i * lanes + k];
}

static int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// Memory for one use within a call, kept by the thread for its next call: fresh memory costs more than the arithmetic on it.
enum Use { CODES, CHUNKS, SUMS, BRANCH, LOW, SCALES, A_ROWS, A_PANEL, W_ROWS, W_PANEL, W_MINUS, W_SCALES, W_BIAS, B_ROWS, B_PANEL, USES };
static V* kept(Use use, int64_t registers) {
  static thread_local std::vector<V> memory[USES];
  if ((int64_t)memory[use].size() < registers) memory[use] = std::vector<V>(registers);
  return memory[use].data();
}
template <class Of> static Of* scratch(Use use, int64_t n) { return (Of*)kept(use, up(n * sizeof(Of), sizeof(V)) / sizeof(V)); }

// An output, uninitialised. Page faults of fresh memory take up to a third of a call, and malloc hands blocks of 32 MB or more back
// to the system when they are freed; so the last two freed outputs of 32 to 256 MB are kept for the next ones.
static Tensor output(at::IntArrayRef size, const at::TensorOptions& options) {
  struct Block {
    int64_t bytes;
    void* data;
  };
  static auto& freed = *new std::vector<Block>;  // never destroyed: outputs may live longer than static variables
  static auto& lock = *new std::mutex;
  Block block{up(c10::multiply_integers(size) * options.dtype().itemsize(), 64), nullptr};
  if (block.bytes < 32 << 20 || block.bytes > 256 << 20) return at::empty(size, options);
  {
    std::lock_guard guard(lock);
    const auto fits = [&](const Block& b) { return b.bytes >= block.bytes && b.bytes <= 2 * block.bytes; };
    if (const auto found = std::find_if(freed.begin(), freed.end(), fits); found != freed.end()) block = *found, freed.erase(found);
  }
  if (!block.data) block.data = std::aligned_alloc(64, block.bytes);
  TORCH_CHECK(block.data, "not enough memory for an output of ", block.bytes >> 20, " MB");
  const auto release = [block](void*) {
    std::lock_guard guard(lock);
    freed.push_back(block);
    if (freed.size() > 2) std::free(freed[0].data), freed.erase(freed.begin());
  };
  return at::from_blob(block.data, size, release, options);
}

// --------------------------------------------------------------------------------------------------- the steps

struct Call {  // the arguments of w4a4, those that have one type only as pointers, and the sizes that follow from them
  const Tensor& x;
  const uint8_t *codes, *mult;
  const float *scale, *bias, *inv_smooth, *shift;
  const optional<Tensor>&A, &B;
  const int64_t group, group_x;
  const bool rotated, per_sample;
  const Shape s;
  const int64_t O, K;
  const int64_t taps = s.kh * s.kw, C = K / taps, rank = A ? A->size(0) : 0;
  const Grid& grid = group_x ? FOUR_BITS : EIGHT_BITS;
  const bool chunked = !VNNI && group_x;
  const Table& tables = chunked ? UNSIGNED : SIGNED;
};

// Steps 1 and 2 fill this: codes of x, multipliers of their chunks (AVX2), scales, and x' for the branch, in padded pictures
template <class T, class Low> struct Input {  // Low: what the branch multiplies in, 4 / sizeof(Low) to a lane
  const Call& call;
  const Shape& s = call.s;
  const int64_t pixels = s.N * s.H * s.W, padded_pixels = s.N * s.Hp() * s.Wp();
  const Grid& grid = call.grid;
  const int64_t group = call.group_x ? call.group_x : 64;  // (8 bits: their multipliers are 1 in groups of any size)
  const int64_t Ix = up(s.I, group), Gx = Ix / group;                // channels in whole groups
  const int64_t Cx = std::min(Ix, call.C);                           // of which the product reads these
  const int64_t Cl = up(s.I, 4 / (int64_t)sizeof(Low));              // channels in whole lanes of the branch
  const int64_t chunk = call.chunked ? (group | call.C | 16) & -(group | call.C | 16) : 0;  // largest power of two in all three
  const int64_t chunks = chunk ? call.C / chunk : 0;
  const bool border = s.ph || s.pw;
  const T* const x = call.x.const_data_ptr<T>();
  const float* const inv = call.inv_smooth;
  const bool as_is = std::is_same_v<T, Low> && !inv && !border && Cl == s.I;  // the branch can read x itself
  uint8_t* const codes = scratch<uint8_t>(CODES, padded_pixels * call.C * grid.bytes);
  int32_t* const mult = scratch<int32_t>(CHUNKS, padded_pixels * chunks);
  int32_t* const sums = scratch<int32_t>(SUMS, chunk ? padded_pixels : 0);  // of m q, a pixel
  float* const scale = scratch<float>(SCALES, pixels);
  Low* const branch = call.rank && !as_is ? scratch<Low>(BRANCH, padded_pixels * Cl) : nullptr;

  explicit Input(const Call& c) : call(c) {
    if (border || call.C > Ix) {
      std::fill_n(codes, padded_pixels * call.C * grid.bytes, grid.offset);
      std::fill_n(mult, padded_pixels * chunks, 0);
      std::fill_n(sums, chunk ? padded_pixels : 0, 0);
    }
    if (branch && (border || Cl > s.I)) std::fill_n(branch, padded_pixels * Cl, Low(0.f));
  }

  Rows branch_rows() const { return s.rows(as_is ? (const void*)x : branch, Cl * sizeof(Low)); }

  // each(pixel, z (Ix), bounds of its groups, the largest of them); after(i) when pixels i MR .. (i + 1) MR are done
  template <class Each, class After> void for_pixels(Each each, After after) const {
    at::parallel_for(0, up(pixels, MR) / MR, 1, [&](int64_t i0, int64_t i1) {
      std::vector<float> row(Ix), b(2 * up(Gx, 8));
      for (int64_t i = i0; i < i1; i++) {
        for (int64_t p = i * MR; p < std::min((i + 1) * MR, pixels); p++) {
          smoothed(x + p * s.I, inv, s.I, row.data());
          for (int64_t k = 0; k < s.I && call.shift; k++) row[k] -= call.shift[k];
          if (call.rotated) rotate(row.data(), s.I);
          each(p, row.data(), b.data(), bounds(row.data(), Gx, group, grid, b.data()));
        }
        after(i);
      }
    });
  }

  void quantize_pixel(int64_t p, const float* row, float* b) const {
    const int64_t at = s.padded(p);
    float* inv_m = b + up(Gx, 8);
    multipliers(b, scale[p], Gx, inv_m);
    const auto as_bytes = (group | Cx) % LANES ? quantize<V8, F8, uint8_t> : quantize<V, F, uint8_t>;
    const auto quantize_row = grid.bytes == 1 ? as_bytes : quantize<V8, F8, int16_t>;
    const char* next = (const char*)(x + (p + 1) * s.I);
    const int32_t sum = quantize_row(row, b, inv_m, Cx, group, grid, codes + at * call.C * grid.bytes, next);
    if (chunk) sums[at] = sum;
    for (int64_t k = 0; k < Cx && chunk; k += chunk) mult[at * chunks + k / chunk] = (int32_t)b[k / group] * 0x10001;
  }

  void keep_for_branch(int64_t p) const {
    const T* from = x + p * s.I;
    Low* to = branch + s.padded(p) * Cl;
    if (!inv) return convert(from, s.I, to);
    const int64_t whole = s.I / LANES * LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
      float product[LANES];
      T near[LANES];
      smoothed(from + k, inv + k, LANES, product);
      store(near, load<F>(product));
      convert(near, LANES, to + k);
    }
    for (int64_t k = whole; k < s.I; k++) to[k] = rounded<T, Low>(to_float(from[k]) * inv[k]);
  }

  void share_scales() const {  // from a bound for every pixel to the scale of its sample
    const int64_t size = s.H * s.W;
    for (int64_t n = 0; n < s.N; n++) {
      uint32_t most = 0;
      for (int64_t p = n * size; p < (n + 1) * size; p++) most = std::max(most, bits<uint32_t>(scale[p]));
      std::fill_n(scale + n * size, size, scale_of(bits<float>(most), grid.most));
    }
  }

  template <class After> void quantize_all(After after) const {
    const auto first = [&](int64_t p, const float* row, float* b, float bound) {
      scale[p] = call.per_sample ? bound : scale_of(bound, grid.most);
      if (!call.per_sample) quantize_pixel(p, row, b);
      if (branch) keep_for_branch(p);
    };
    for_pixels(first, after);
    if (!call.per_sample) return;
    share_scales();  // known only now: a second pass over x
    for_pixels([&](int64_t p, const float* row, float* b, float) { quantize_pixel(p, row, b); }, [](int64_t) {});
  }
};

// Step 2: low = x' A^T, (T, Rp) of Low, Rp the rank in whole lanes: two registers of columns at a time, one for small ranks
template <class T, class Low, class Dot> struct Projection {
  const Call& call;
  const Shape& s = call.s;
  const int64_t Cl, rank = call.rank, Rp = up(rank, 4 / (int64_t)sizeof(Low));
  const int64_t lanes = call.taps * Cl / (4 / sizeof(Low)), step = Rp > LANES ? 2 : 1;
  const int64_t registers = up(Rp, step * LANES) / LANES;
  V* const panel = scratch<V>(A_PANEL, registers * lanes);
  Low* const low = scratch<Low>(LOW, up(s.T(), MR) * Rp);

  Projection(const Call& c, int64_t Cl) : call(c), Cl(Cl) {
    const T* A = rank ? call.A->const_data_ptr<T>() : nullptr;
    at::parallel_for(0, registers, 1, [&](int64_t v0, int64_t v1) {
      Low* rows = scratch<Low>(A_ROWS, LANES * call.taps * Cl);
      for (int64_t v = v0; v < v1; v++) {
        std::fill_n(rows, LANES * call.taps * Cl, Low(0.f));
        for (int64_t r = v * LANES; r < std::min((v + 1) * LANES, rank); r++)
          for (int64_t tap = 0; tap < call.taps; tap++)
            convert(A + (r * call.taps + tap) * s.I, s.I, rows + ((r % LANES) * call.taps + tap) * Cl);
        interleave(rows, lanes, panel + v / step * lanes * step + v % step, step);
      }
    });
  }

  template <int N> void columns(const char* const at[MR], const Rows& in, const V* panel, Low* to, int64_t n) const {
    V acc[MR][N] = {};
    tile<Dot, MR, N>(at, in, panel, acc);
    for (int m = 0; m < MR; m++) {
      T rounded[N * LANES];
      for (int j = 0; j < N; j++) store(rounded + j * LANES, (F)acc[m][j]);
      convert(rounded, n, to + m * Rp);
    }
  }

  void operator()(const Rows& in, int64_t i) const {  // outputs i MR .. (i + 1) MR
    int64_t pixel[MR];
    const char* at[MR];
    s.windows(i * MR, pixel);
    for (int m = 0; m < MR; m++) at[m] = in.data + pixel[m] * Cl * sizeof(Low);
    for (int64_t r = 0; r < Rp; r += step * LANES) {
      const int64_t n = std::min(step * LANES, Rp - r);
      const V* p = panel + r / LANES * lanes;
      step == 2 ? columns<2>(at, in, p, low + i * MR * Rp + r, n) : columns<1>(at, in, p, low + i * MR * Rp + r, n);
    }
  }
};

// Steps 1 and 2; the branch of a linear layer is projected while its rows are in the cache
template <class T, class Low, class Dot>
static void quantize_and_project(const Input<T, Low>& in, const Projection<T, Low, Dot>& project) {
  const Shape& s = in.s;
  const Rows rows = in.branch_rows();
  const bool linear = in.call.taps == 1 && s.T() == in.pixels && !in.border;
  if (in.call.rank && linear) return in.quantize_all([&](int64_t i) { project(rows, i); });
  in.quantize_all([](int64_t) {});
  if (in.call.rank)
    at::parallel_for(0, up(s.T(), MR) / MR, 1, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; i++) project(rows, i);
    });
}

// Step 3: the panels of a thread, of at most `wide` times WIDTH columns, which fit its L2 cache
template <class T, class Low> struct Panels {
  const Call& call;
  const int64_t bytes = call.grid.bytes, lanes = call.K * bytes / 4, lanes_low;
  const int64_t wide = std::max<int64_t>(1, (256 << 10) / (lanes * 4 * WIDTH));
  V* const codes = scratch<V>(W_PANEL, wide * lanes * NR);
  V* const minus = scratch<V>(W_MINUS, wide * NR);
  V* const B = scratch<V>(B_PANEL, wide * lanes_low * NR);
  float* const scale = scratch<float>(W_SCALES, wide * WIDTH);
  float* const bias = scratch<float>(W_BIAS, wide * WIDTH);
  const T* const from_B = call.rank ? call.B->const_data_ptr<T>() : nullptr;
  int8_t* const rows = scratch<int8_t>(W_ROWS, LANES * BLOCK * bytes);
  Low* const rows_B = scratch<Low>(B_ROWS, LANES * lanes_low * (4 / sizeof(Low)));

  Panels(const Call& c, int64_t lanes_low) : call(c), lanes_low(lanes_low) {}

  void load(int64_t c0, int64_t c1) const {  // columns c0 WIDTH .. c1 WIDTH, a register at a time; those beyond O are zero
    for (int64_t v = 0; v < (c1 - c0) * NR; v++) {
      const int64_t o0 = c0 * WIDTH + v * LANES, at = v / NR, j = v % NR;
      load_codes(o0, codes + at * lanes * NR + j);
      load_branch(o0, B + at * lanes_low * NR + j);
      for (int64_t i = 0; i < LANES; i++) {
        const int64_t o = o0 + i;
        scale[v * LANES + i] = o < call.O ? call.scale[o] : 0;
        bias[v * LANES + i] = o < call.O && call.bias ? call.bias[o] : 0;
      }
    }
    for (int64_t c = 0; c < c1 - c0; c++) sum_offsets(codes + c * lanes * NR, minus + c * NR);
  }

  void load_codes(int64_t o0, V* to) const {
    for (int64_t k = 0; k < call.K; k += BLOCK) {
      const int64_t n = std::min(BLOCK, call.K - k);
      if (o0 + LANES > call.O) std::fill_n(rows, LANES * n * bytes, 0);
      for (int64_t i = 0; i < std::min<int64_t>(LANES, call.O - o0); i++) {
        int8_t m_q[BLOCK], *row = rows + i * n * bytes;
        unpack(call.codes, call.mult, o0 + i, call.K, call.group, k, k + n, call.tables, bytes == 1 ? row : m_q);
        if (bytes == 2) std::copy_n(m_q, n, (int16_t*)row);
      }
      interleave(rows, n * bytes / 4, to + k * bytes / 4 * NR, NR);
    }
  }

  void load_branch(int64_t o0, V* to) const {
    const int64_t Rp = lanes_low * (4 / sizeof(Low));
    std::fill_n(rows_B, LANES * Rp, Low(0.f));  // from the rank to Rp, and for columns beyond O
    for (int64_t i = 0; i < LANES && o0 + i < call.O && call.rank; i++)
      convert(from_B + (o0 + i) * call.rank, call.rank, rows_B + i * Rp);
    interleave(rows_B, lanes_low, to, NR);
  }

  void sum_offsets(const V* panel, V* to) const {  // what rows that are stored with an offset add to the sums
    V sum[NR] = {};
    for (int64_t k = 0; k < lanes && VNNI; k++)
      UNROLL for (int j = 0; j < NR; j++) sum[j] = Codes::dot(sum[j], broadcast(call.grid.offset * 0x01010101u), panel[k * NR + j]);
    for (int j = 0; j < NR; j++) to[j] = -sum[j];
  }
};

// How threads share the outputs: a grid of row ranges x column ranges. The best split leaves the least to the busiest thread.
struct Split {
  int64_t tiles, columns, by_rows, by_columns;

  Split(int64_t tiles, int64_t columns, int64_t threads) : tiles(tiles), columns(columns), by_rows(1) {
    int64_t least = INT64_MAX;
    for (int64_t r = 1; r <= threads; r++)
      if (threads % r == 0)
        if (int64_t work = (up(tiles, r) / r) * (up(columns, threads / r) * r / threads); work < least) by_rows = r, least = work;
    by_columns = threads / by_rows;
  }
};

// Step 3: y = s_x s_w (X W^T) + bias + low B^T
template <class T, class Low, class Dot> struct Product {
  const Call& call;
  const Input<T, Low>& input;
  const Projection<T, Low, Dot>& projection;
  T* const y;
  const Shape& s = call.s;
  const int64_t chunks = input.chunks, lanes_low = projection.Rp / (4 / (int64_t)sizeof(Low));
  const Rows codes = s.rows(input.codes, call.C * call.grid.bytes), mult = s.rows(input.mult, chunks * 4);
  const Rows low{(const char*)projection.low, 1, lanes_low, 0};
  const int64_t row_bytes = call.O * sizeof(T);
  const bool stream = s.T() * row_bytes > (16 << 20) && row_bytes % 64 == 0;  // no cache keeps y for its reader
  using Outputs = decltype(outputs_of<T, Dot, MR>(0));
  const Outputs outputs = outputs_of<T, Dot, MR>(input.chunk), two_outputs = outputs_of<T, Dot, 2>(input.chunk);  // often the last

  void operator()() const {
    const int64_t threads = at::get_num_threads();
    const Split split(up(s.T(), MR) / MR, up(call.O, WIDTH) / WIDTH, threads);
    at::parallel_for(0, threads, 1, [&](int64_t w0, int64_t w1) {
      const Panels<T, Low> panels(call, lanes_low);
      for (int64_t w = w0; w < w1; w++) {
        const int64_t wr = w / split.by_columns, wc = w % split.by_columns;
        const int64_t t0 = split.tiles * wr / split.by_rows, t1 = split.tiles * (wr + 1) / split.by_rows;
        if (t0 == t1) continue;  // more threads than tiles
        const int64_t end = split.columns * (wc + 1) / split.by_columns;
        for (int64_t c0 = split.columns * wc / split.by_columns; c0 < end; c0 += panels.wide) {
          const int64_t c1 = std::min(c0 + panels.wide, end);
          panels.load(c0, c1);
          multiply(panels, t0, t1, c0, c1, std::min(c1 + panels.wide, end));
        }
      }
      _mm_sfence();  // streamed outputs are there before others read them
    });
  }

  // Tiles t0 .. t1 of rows by columns c0 .. c1. The packed columns up to `next_end` come nearer meanwhile, piece by piece.
  void multiply(const Panels<T, Low>& panels, int64_t t0, int64_t t1, int64_t c0, int64_t c1, int64_t next_end) const {
    const auto packed = [&](int64_t c) { return call.codes + std::min(call.O, c * WIDTH) * (call.K / 2); };
    const uint8_t *next = packed(c1), *end = packed(next_end);
    const int64_t piece = up((end - next) / (t1 - t0) + 1, 64);
    for (int64_t i = t0; i < t1; i++) {
      for (const uint8_t* stop = std::min(next + piece, end); next < stop; next += 64) __builtin_prefetch(next, 0, 2);
      const Windows rows = windows(i);
      for (int64_t c = c0; c < c1; c++) {
        const int64_t at = c - c0;
        const Panel panel{panels.codes + at * panels.lanes * NR, panels.minus + at * NR,
                          panels.B + at * lanes_low * NR,        panels.scale + at * WIDTH,
                          panels.bias + at * WIDTH,              std::min<int64_t>(WIDTH, call.O - c * WIDTH), stream};
        (rows.count > 2 ? outputs : two_outputs)(rows, panel, codes, mult, low, y + i * MR * call.O + c * WIDTH, call.O);
      }
    }
  }

  Windows windows(int64_t i) const {  // of outputs i MR .. (i + 1) MR
    Windows w;
    int64_t pixel[MR];
    s.windows(i * MR, pixel);
    w.count = std::min<int64_t>(MR, s.T() - i * MR);
    for (int64_t m = 0; m < MR; m++) {
      const int64_t t = std::min(i * MR + m, s.T() - 1);
      w.codes[m] = codes.data + pixel[m] * call.C * call.grid.bytes;
      w.mult[m] = mult.data + pixel[m] * chunks * 4;
      w.low[m] = low.data + t * projection.Rp * sizeof(Low);
      w.scale[m] = input.scale[call.per_sample ? t / (s.Ho() * s.Wo()) * s.H * s.W : t];
      w.minus[m] = 0;
      for (int64_t tap = 0; tap < call.taps && input.chunk; tap++)
        w.minus[m] += 128 * input.sums[pixel[m] + tap / s.kw * s.Wp() + tap % s.kw];
    }
    return w;
  }
};

// ------------------------------------------------------------------------------------------------------ the op

template <class T, class Low, class Dot> static Tensor run(const Call& call) {
  const Shape& s = call.s;
  Tensor y = output({s.N, s.Ho(), s.Wo(), call.O}, call.x.options());
  if (y.numel() == 0) return y;
  const Input<T, Low> input(call);
  const Projection<T, Low, Dot> projection(call, input.Cl);
  quantize_and_project(input, projection);
  Product<T, Low, Dot>{call, input, projection, y.mutable_data_ptr<T>()}();
  return y;
}

// x (N, H, W, I) contiguous -> (N, H', W', O) in x's dtype. The arguments are those of backends/cpu.py, A and B in x's dtype.
static Tensor w4a4(const Tensor& x, const Tensor& codes, const Tensor& mult, const Tensor& scale, const optional<Tensor>& bias,
                   const optional<Tensor>& A, const optional<Tensor>& B, const optional<Tensor>& inv_smooth,
                   const optional<Tensor>& shift, int64_t group, int64_t group_x, bool rotated, bool per_sample,
                   at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const Shape s{x.size(0), x.size(1), x.size(2), x.size(3), kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  const auto floats = [](const optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  const Call call{x, codes.const_data_ptr<uint8_t>(), mult.const_data_ptr<uint8_t>(),
                  floats(scale), floats(bias), floats(inv_smooth), floats(shift),
                  A, B, group, group_x, rotated, per_sample, s, codes.size(0), codes.size(1) * 2};
  if (x.scalar_type() == at::kFloat) return run<float, float, Float>(call);
  if (x.scalar_type() == at::kHalf) return run<at::Half, float, Float>(call);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, "x must be float32, bfloat16 or float16, got ", x.scalar_type());
#ifdef __AVX512BF16__
  return run<at::BFloat16, at::BFloat16, Bfloat>(call);
#else
  return run<at::BFloat16, float, Float>(call);
#endif
}

TORCH_LIBRARY_FRAGMENT(cmquant, m) {
  m.def(
      "w4a4(Tensor x, Tensor codes, Tensor mult, Tensor scale, Tensor? bias, Tensor? A, Tensor? B, Tensor? inv_smooth, Tensor? shift, "
      "int group, int group_x, bool rotated, bool per_sample, int[2] kernel, int[2] stride, int[2] padding) -> Tensor");
  m.impl("w4a4", c10::DispatchKey::CPU, w4a4);
}
