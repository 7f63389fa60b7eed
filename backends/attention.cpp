
// =============================================================================================== attention in 8 bits
//
// softmax(scale q k^T + mask) v of backends/attention.py, compiled behind cpu.cpp, whose registers and panels it uses. A task is
// ROWS queries of a head: they meet the keys a block of KEYS at a time, so that no T x S matrix is ever there.
//
//     Keys       of a head, prepared once: (k - mean(k)) / lambda in codes with one scale for each key; v - mean(v) in codes with one
//                scale for each channel of a block. Both lie in panels, as weights do.
//     Logits     q lambda is rounded a row at a time, with an offset, since both units multiply unsigned by signed bytes.
//     Softmax    p = 2^(l - the row's largest l in this block), in unsigned codes up to PMAX: every block has its whole range. The sum
//                that divides is that of the codes, so that what is added up has weights of sum one.
//     Values     codes of p times codes of v, exact sums of a block; then float32, times 2^(l of the block - largest l so far).
//
// AVX2 adds two pairs of products in int16, so that codes have 7 bits there: 127 x 63 four times fits. VNNI: 8 bits.

constexpr int QMAX = VNNI ? 127 : 63, PMAX = VNNI ? 255 : 127, OFFSET = QMAX + 1;
constexpr int64_t KEYS = 64, TILES = 8, ROWS = TILES * MR, LANES_OF_KEYS = KEYS / 4;
static_assert(KEYS % WIDTH == 0);

static inline V two_lanes(V acc, V a0, V b0, V a1, V b1) {  // acc += a0 . b0 + a1 . b1
#ifdef __AVX512VNNI__
  return Codes::dot(Codes::dot(acc, a0, b0), a1, b1);
#else
  return acc + (V)_mm256_madd_epi16((__m256i)Codes::dot(Codes::first(a0, b0), a1, b1), _mm256_set1_epi16(1));
#endif
}

// acc += MR rows of `lanes` lanes, an even number, `stride` bytes apart, times a panel of N registers of columns
template <int N>
[[gnu::always_inline]] static inline void sums(const uint8_t* rows, int64_t stride, const V* panel, int64_t lanes, V acc[MR][N]) {
  for (int64_t k = 0; k < lanes; k += 2, panel += 2 * N)
    UNROLL for (int i = 0; i < MR; i++) {
      const V a0 = broadcast(load<int32_t>(rows + i * stride + 4 * k)), a1 = broadcast(load<int32_t>(rows + i * stride + 4 * k + 4));
      UNROLL for (int j = 0; j < N; j++) acc[i][j] = two_lanes(acc[i][j], a0, panel[j], a1, panel[N + j]);
    }
}

static inline F fma(F a, F b, F c) { return (F)Float::dot((V)c, (V)a, (V)b); }
static inline F two_to_the(F x) {  // 2^x for -126 < x < 127, to 1e-4 of it: a code of p is one of 127 or 255
  const F shifted = x + MAGIC, f = x - (shifted - MAGIC), c0 = F{} + 0.99992894f, c1 = F{} + 0.69327624f;
  const F p = fma(f, fma(f, fma(f, F{} + 0.05508868f, F{} + 0.24260405f), c1), c0);
  return (F)((V)p + ((V)shifted << 23));
}
#ifdef __AVX512VNNI__
static inline V nearest(F x) { return (V)_mm512_cvtps_epi32((__m512)x); }
static inline float largest_in(F v) { return _mm512_reduce_max_ps((__m512)v); }
static inline int32_t sum_of(V v) { return _mm512_reduce_add_epi32((__m512i)v); }
static inline void store_bytes(uint8_t* to, const V* v) {  // four registers of 0..255
  for (int j = 0; j < 4; j++) _mm_storeu_si128((__m128i*)(to + j * LANES), _mm512_cvtepi32_epi8((__m512i)v[j]));
}
#else
static inline V nearest(F x) { return (V)_mm256_cvtps_epi32((__m256)x); }
static inline float largest_in(F v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
static inline int32_t sum_of(V v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0b10110001)));
}
static inline void store_bytes(uint8_t* to, const V* v) {
  const __m256i a = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), b = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), in_order));
}
#endif

struct Heads {  // (B, H, T, D) of any strides, the last one 1
  const Tensor& x;
  template <class T> const T* row(int64_t b, int64_t h, int64_t t) const {
    return x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1) + t * x.stride(2);
  }
};

struct Sizes {
  int64_t B, H, T, S, D;
  int64_t Dq = up(D, 8), Dv = up(D, LANES), blocks = up(S, KEYS) / KEYS;
};

// Keys and values of one head, in memory of `bytes`
struct Keys {
  const Sizes& z;
  V *const k, *const v;                              // panels of a block after the other
  float *const scale_k, *const pad, *const scale_v;  // a key's scale; 0, or -inf where there is none; of each block's channels
  int32_t* const minus;                              // what takes the offset of q off again
  float *const lambda, *const mean_v;                // after Dv means: NaN if something here is no number, else 0

  static int64_t bytes(const Sizes& z) {
    return up(z.blocks * (KEYS * (z.Dq + z.Dv) + 4 * (3 * KEYS + z.Dv)) + 4 * (2 * z.Dv + 1), 64);
  }
  Keys(const Sizes& z, char* memory)
      : z(z), k((V*)memory), v((V*)(memory + z.blocks * KEYS * z.Dq)), scale_k((float*)(memory + z.blocks * KEYS * (z.Dq + z.Dv))),
        pad(scale_k + z.blocks * KEYS), scale_v(pad + z.blocks * KEYS), minus((int32_t*)(scale_v + z.blocks * z.Dv)),
        lambda((float*)(minus + z.blocks * KEYS)), mean_v(lambda + z.Dv) {}
  const V* block_k(int64_t i) const { return k + i * KEYS * z.Dq / sizeof(V); }
  const V* block_v(int64_t i) const { return v + i * KEYS * z.Dv / sizeof(V); }

  template <class T> void prepare(const Heads& keys, const Heads& values, int64_t b, int64_t h) const {
    std::vector<float> mean_k(z.D), square_k(z.D), x(KEYS * z.Dv);
    std::vector<int8_t> codes(KEYS * std::max(z.Dq, z.Dv));
    std::fill_n(mean_v, z.Dv + 1, 0.f);
    for (int64_t s = 0; s < z.S; s++) {
      const T *from_k = keys.row<T>(b, h, s), *from_v = values.row<T>(b, h, s);
      for (int64_t d = 0; d < z.D; d++) mean_k[d] += to_float(from_k[d]), mean_v[d] += to_float(from_v[d]);
    }
    for (int64_t d = 0; d < z.D; d++) mean_k[d] /= z.S, mean_v[d] /= z.S;
    for (int64_t s = 0; s < z.S; s++) {
      const T* from = keys.row<T>(b, h, s);
      for (int64_t d = 0; d < z.D; d++) {
        const float x = to_float(from[d]) - mean_k[d];
        square_k[d] += x * x;
      }
    }
    for (int64_t d = 0; d < z.D; d++) lambda[d] = square_k[d] > 0 ? std::sqrt(std::sqrt(square_k[d] / z.S)) : 1;
    float poison = 0;
    for (int64_t i = 0; i < z.blocks; i++) {
      const int64_t n = std::min(KEYS, z.S - i * KEYS);
      std::fill(codes.begin(), codes.end(), 0);
      for (int64_t j = 0; j < KEYS; j++) {
        float& scale = scale_k[i * KEYS + j] = 0;
        int32_t& minus_j = minus[i * KEYS + j] = 0;
        pad[i * KEYS + j] = j < n ? 0 : -INFINITY;
        if (j >= n) continue;
        const T* from = keys.row<T>(b, h, i * KEYS + j);
        for (int64_t d = 0; d < z.D; d++) x[d] = (to_float(from[d]) - mean_k[d]) / lambda[d];
        scale = step_of(x.data(), z.D);
        round(x.data(), z.D, scale, codes.data() + j * z.Dq);
        for (int64_t d = 0; d < z.D; d++) minus_j -= OFFSET * codes[j * z.Dq + d];
        poison += 0 * scale;
      }
      for (int64_t r = 0; r < KEYS / LANES; r++)
        interleave(codes.data() + r * LANES * z.Dq, z.Dq / 4, (V*)block_k(i) + r / NR * (z.Dq / 4) * NR + r % NR, NR);

      std::fill(codes.begin(), codes.end(), 0);
      for (int64_t j = 0; j < n; j++) {
        const T* from = values.row<T>(b, h, i * KEYS + j);
        for (int64_t d = 0; d < z.D; d++) x[d * KEYS + j] = to_float(from[d]) - mean_v[d];
      }
      for (int64_t d = 0; d < z.Dv; d++) {
        float& scale = scale_v[i * z.Dv + d] = d < z.D ? step_of(x.data() + d * KEYS, n) : 0;
        if (d < z.D) round(x.data() + d * KEYS, n, scale, codes.data() + d * KEYS);
        poison += 0 * scale;
      }
      for (int64_t r = 0, at = 0; r < z.Dv / LANES; at += LANES_OF_KEYS * registers_at(r), r += registers_at(r))
        for (int64_t j = 0; j < registers_at(r); j++)
          interleave(codes.data() + (r + j) * LANES * KEYS, LANES_OF_KEYS, (V*)block_v(i) + at + j, registers_at(r));
    }
    mean_v[z.Dv] = poison;
  }

  int64_t registers_at(int64_t r) const { return z.Dv / LANES - r >= NR ? NR : 1; }  // columns of v that are summed together from r
  static float step_of(const float* x, int64_t n) {
    uint32_t most = 0;  // NaN wins, as bits of a positive number do
    for (int64_t i = 0; i < n; i++) most = std::max(most, bits<uint32_t>(x[i]) & 0x7fffffff);
    return scale_of(bits<float>(most), QMAX);
  }
  template <class Code> static void round(const float* x, int64_t n, float step, Code* to, int32_t offset = 0) {
    const float inv = 1 / step;
    for (int64_t i = 0; i < n; i++) to[i] = bits<int32_t>(x[i] * inv + MAGIC) - bits<int32_t>(MAGIC) + offset;
  }
};

struct Mask {  // float32, strides of (B, H, T, S); null: none
  const float* data;
  int64_t b, h, t, s;
};

// ROWS queries of a head, from t0
template <class T> struct Queries {
  const Sizes& z;
  const Keys& keys;
  const float* mask;  // of (b, h, 0, 0)
  const Mask& strides;
  const int64_t t0, count;
  uint8_t* const codes = scratch<uint8_t>(CODES, ROWS * z.Dq);
  uint8_t* const p = scratch<uint8_t>(A_ROWS, MR * KEYS);
  float* const logits = scratch<float>(LOW, MR * KEYS);
  float* const sum = scratch<float>(BRANCH, ROWS * z.Dv);  // of weighted values
  float scale[ROWS], most[ROWS], weight[ROWS];             // of q; largest logit so far; sum of p

  Queries(const Sizes& z, const Keys& keys, const float* mask, const Mask& strides, int64_t t0)
      : z(z), keys(keys), mask(mask), strides(strides), t0(t0), count(std::min(ROWS, z.T - t0)) {}

  void round_rows(const Heads& q, int64_t b, int64_t h, float scale_of_logits) {
    float* x = scratch<float>(W_SCALES, z.D);
    std::fill_n(codes, ROWS * z.Dq, OFFSET);
    std::fill_n(sum, ROWS * z.Dv, 0.f);
    for (int64_t i = 0; i < ROWS; i++) {
      most[i] = -INFINITY, weight[i] = scale[i] = 0;
      if (i >= count) continue;
      convert(q.row<T>(b, h, t0 + i), z.D, x);
      for (int64_t d = 0; d < z.D; d++) x[d] *= keys.lambda[d];
      const float step = Keys::step_of(x, z.D);
      Keys::round(x, z.D, step, codes + i * z.Dq, OFFSET);
      scale[i] = step * scale_of_logits * 1.44269504f;  // powers of two
    }
  }

  void meet(int64_t block) {
    for (int64_t i = 0; i < count; i += MR) {
      find_logits(block, i);
      float factor[MR];
      for (int64_t r = 0; r < MR; r++) factor[r] = i + r < count ? softmax_row(block, i + r, logits + r * KEYS, p + r * KEYS) : 0;
      const V* panel = keys.block_v(block);
      for (int64_t r = 0; r < z.Dv / LANES;) {
        const int64_t n = keys.registers_at(r);
        n == NR ? add_values<NR>(panel, block, i, r, factor) : add_values<1>(panel, block, i, r, factor);
        panel += LANES_OF_KEYS * n, r += n;
      }
    }
  }

  void find_logits(int64_t block, int64_t i) {
    const V* panel = keys.block_k(block);
    for (int64_t j0 = 0; j0 < KEYS; j0 += WIDTH, panel += z.Dq / 4 * NR) {
      V acc[MR][NR];
      UNROLL for (int r = 0; r < MR; r++) {
        UNROLL for (int j = 0; j < NR; j++) acc[r][j] = load<V>(keys.minus + block * KEYS + j0 + j * LANES);
      }
      sums<NR>(codes + i * z.Dq, z.Dq, panel, z.Dq / 4, acc);
      UNROLL for (int r = 0; r < MR; r++) {
        UNROLL for (int j = 0; j < NR; j++) {
          const int64_t at = block * KEYS + j0 + j * LANES;
          const F l = __builtin_convertvector(acc[r][j], F) * load<F>(keys.scale_k + at) * scale[i + r] + load<F>(keys.pad + at);
          store(logits + r * KEYS + j0 + j * LANES, l);
        }
      }
    }
  }

  // Logits of a row -> codes of p, and what the block's sums are multiplied by
  float softmax_row(int64_t block, int64_t i, float* l, uint8_t* to) {
    if (mask) {
      const float* from = mask + (t0 + i) * strides.t + block * KEYS * strides.s;
      for (int64_t j = 0; j < std::min(KEYS, z.S - block * KEYS); j++) l[j] += 1.44269504f * from[j * strides.s];
    }
    F v[KEYS / LANES], most_here;
    memcpy(v, l, sizeof v);
    most_here = v[0];
    UNROLL for (int64_t j = 1; j < KEYS / LANES; j++) most_here = v[j] > most_here ? v[j] : most_here;
    const float here = std::max(largest_in(most_here), -1e30f), all = std::max(most[i], here);
    const F begin = F{} + (here - (VNNI ? 7.99435344f : 6.98868469f)), least = F{} - 30.f;  // log2 of PMAX
    V total{};
    for (int64_t j = 0; j < KEYS / LANES; j += 4) {
      V code[4];
      UNROLL for (int n = 0; n < 4; n++) {
        const F x = v[j + n] - begin;
        total += code[n] = nearest(two_to_the(x > least ? x : least));
      }
      store_bytes(to + j * LANES, code);
    }
    const int32_t codes_of_row = sum_of(total);
    if (all > most[i]) {
      const float less = std::exp2(most[i] - all);
      for (int64_t d = 0; d < z.Dv; d++) sum[i * z.Dv + d] *= less;
      weight[i] *= less;
      most[i] = all;
    }
    const float factor = std::exp2(here - all);
    weight[i] += factor * codes_of_row;
    return factor;
  }

  template <int N> void add_values(const V* panel, int64_t block, int64_t i, int64_t r0, const float factor[MR]) {
    V acc[MR][N] = {};
    sums<N>(p, KEYS, panel, LANES_OF_KEYS, acc);
    UNROLL for (int r = 0; r < MR; r++) {
      UNROLL for (int j = 0; j < N; j++) {
        float* to = sum + (i + r) * z.Dv + (r0 + j) * LANES;
        const F scale_v = load<F>(keys.scale_v + block * z.Dv + (r0 + j) * LANES);
        store(to, load<F>(to) + __builtin_convertvector(acc[r][j], F) * (scale_v * factor[r]));
      }
    }
  }

  void write(T* y, int64_t stride) const {  // y: of row t0
    for (int64_t i = 0; i < count; i++) {
      const float poison = keys.mean_v[z.Dv] + 0 * scale[i], one = 1 / weight[i] + poison;
      for (int64_t d = 0; d < z.D; d++) store(y + i * stride + d, sum[i * z.Dv + d] * one + keys.mean_v[d]);
    }
  }
};

template <class T> static void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Mask& mask, float scale, Tensor& y) {
  const Sizes z{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
  const int64_t heads = z.B * z.H, groups = up(z.T, ROWS) / ROWS, bytes = Keys::bytes(z);
  const Tensor memory = at::empty({heads * bytes + 64}, q.options().dtype(at::kByte));
  char* const begin = (char*)up((int64_t)memory.mutable_data_ptr<uint8_t>(), 64);
  at::parallel_for(0, heads, 1, [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n++) Keys(z, begin + n * bytes).prepare<T>({k}, {v}, n / z.H, n % z.H);
  });
  at::parallel_for(0, heads * groups, 1, [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n++) {
      const int64_t head = n / groups, b = head / z.H, h = head % z.H, t0 = n % groups * ROWS;
      const Keys keys(z, begin + head * bytes);
      Queries<T> rows(z, keys, mask.data ? mask.data + b * mask.b + h * mask.h : nullptr, mask, t0);
      rows.round_rows({q}, b, h, scale);
      for (int64_t block = 0; block < z.blocks; block++) rows.meet(block);
      rows.write(y.mutable_data_ptr<T>() + ((b * z.T + t0) * z.H + h) * z.D, z.H * z.D);
    }
  });
}

// q (B, H, T, D), k and v (B, H, S, D) of one dtype, any strides but 1 for D; mask float32, expanded to (B, H, T, S) -> (B, T, H, D)
static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& mask, double scale) {
  Tensor y = output({q.size(0), q.size(2), q.size(1), q.size(3)}, q.options());
  if (y.numel() == 0) return y;
  Mask m{};
  if (mask) m = {mask->const_data_ptr<float>(), mask->stride(0), mask->stride(1), mask->stride(2), mask->stride(3)};
  if (q.scalar_type() == at::kFloat) attend<float>(q, k, v, m, scale, y);
  else if (q.scalar_type() == at::kHalf) attend<at::Half>(q, k, v, m, scale, y);
  else if (q.scalar_type() == at::kBFloat16) attend<at::BFloat16>(q, k, v, m, scale, y);
  else TORCH_CHECK_VALUE(false, "q must be float32, bfloat16 or float16, got ", q.scalar_type());
  return y;
}

TORCH_LIBRARY_FRAGMENT(cmquant, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
  m.impl("attention", c10::DispatchKey::CPU, attention);
}
