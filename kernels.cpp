// w4a4 of kernels.py as one C++ kernel: quantize once, unpack a panel of weights at a time, multiply, finish in registers' reach.
//
//     rows     codes of every pixel as bytes, padded: (N, H + 2p, W + 2p, C). A window of a convolution is kh runs of
//              kw C codes, so windows are read where they lie (no im2col); a linear layer is the case N = T, H = W = 1.
//     panel    WIDTH output channels, unpacked (m q) and interleaved: (K / 4, WIDTH, 4); a lane of 32 bits holds 4 codes.
//     tile     MR rows x WIDTH columns in registers: acc += lane(row) . lane(panel), for codes, bfloat16 or float32 alike.
//     finish   y = s_x s_w acc + bias + low B^T, rounded once to the type of x; low = x' A^T is a tile product as well.
//
// Every output is summed in one order, whatever the batch and the threads; sums of codes are exact int32. Both units multiply
// unsigned by signed bytes:
//
//     VNNI     rows hold m q + 128; 128 times the sum of each weight row is taken off again.
//     AVX2     rows hold q + 8 and, apart, m, because the unit's pairs of products saturate at int16: 15 x 128 twice fits. A chunk
//              of at most 32 codes is summed in int16, beginning at -8 times the sum of its weights, and then multiplied by m.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

using at::Tensor;
using std::optional;

#ifdef __AVX512VNNI__
using V = __m512i;
constexpr bool VNNI = true;
constexpr int OFFSET = 128, MR = 14;
static inline V broadcast(int32_t a) { return _mm512_set1_epi32(a); }
static inline V fma(V acc, V a, V b) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc); }
#else
using V = __m256i;
constexpr bool VNNI = false;
constexpr int OFFSET = 8, MR = 6;
static inline V broadcast(int32_t a) { return _mm256_set1_epi32(a); }
static inline V fma(V acc, V a, V b) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc); }
#endif
constexpr int NR = 2, LANES = sizeof(V) / 4, WIDTH = NR * LANES;
constexpr float HI = 1 / 7.5, LO = 1 / 8.5, TINY = 1e-30f, MAGIC = 12582912.f;  // 1.5 2^23: adding it rounds to an integer

struct Float {  // lane of one float32
  static V dot(V acc, V a, V b) { return fma(acc, a, b); }
};
#ifdef __AVX512BF16__
struct Bfloat {  // lane of two bfloat16
  static V dot(V acc, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
};
#endif

template <class To, class From> static inline To bits(From x) { return __builtin_bit_cast(To, x); }

static inline float to_float(float x) { return x; }
static inline float to_float(at::BFloat16 x) { return bits<float>((uint32_t)x.x << 16); }
static inline float to_float(at::Half x) { return _cvtsh_ss(x.x); }
static inline void store(float* y, float x) { *y = x; }
static inline void store(at::BFloat16* y, float x) {  // to nearest even
  uint32_t u = bits<uint32_t>(x);
  y->x = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static inline void store(at::Half* y, float x) { y->x = _cvtss_sh(x, 0); }
template <class T, class Low> static inline Low rounded(float x) {  // to T, which Low holds exactly
  T v;
  store(&v, x);
  return Low(to_float(v));
}

// ---------------------------------------------------------------------------------------------------------- tile

struct Rows {  // where windows lie: `runs` pieces of `steps` lanes, `stride` bytes apart
  const char* data;
  int64_t runs, steps, stride;
};

template <class Dot>
static void tile(const char* const row[MR], const Rows& in, const V* panel, V acc[MR][NR]) {
  V sum[MR][NR];
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) sum[i][j] = acc[i][j];
  for (int64_t run = 0; run < in.runs; run++) {
    const int32_t* a[MR];
    for (int i = 0; i < MR; i++) a[i] = (const int32_t*)(row[i] + run * in.stride);
    for (int64_t k = 0; k < in.steps; k++, panel += NR) {
      V b[NR];
      for (int j = 0; j < NR; j++) b[j] = panel[j];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        V ai = broadcast(a[i][k]);
#pragma GCC unroll 2
        for (int j = 0; j < NR; j++) sum[i][j] = Dot::dot(sum[i][j], ai, b[j]);
      }
    }
  }
  for (int i = 0; i < MR; i++)
    for (int j = 0; j < NR; j++) acc[i][j] = sum[i][j];
}

// Codes: acc += x . w. `mult` (AVX2) has m of every chunk of STEPS lanes, in both halves of a lane, `minus` -8 times its weights.
#ifdef __AVX512VNNI__
struct Codes {  // lane of four codes
  static V dot(V acc, V a, V b) { return _mm512_dpbusd_epi32(acc, a, b); }
};
template <int STEPS>
static void tile_codes(const char* const row[MR], const Rows& in, const char* const*, const Rows&, const V* panel, const V*,
                       V acc[MR][NR]) {
  tile<Codes>(row, in, panel, acc);
}
#else
template <int STEPS>
static void tile_codes(const char* const row[MR], const Rows& in, const char* const mult[MR], const Rows& in_mult, const V* panel,
                       const V* minus, V acc[MR][NR]) {
  for (int64_t run = 0; run < in.runs; run++) {
    const int32_t *a[MR], *m[MR];
    for (int i = 0; i < MR; i++) {
      a[i] = (const int32_t*)(row[i] + run * in.stride);
      m[i] = (const int32_t*)(mult[i] + run * in_mult.stride);
    }
    for (int64_t chunk = 0; chunk < in_mult.steps; chunk++, minus += NR, panel += STEPS * NR) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {  // a row at a time: its sums stay in registers, the chunk's panel in the L1 cache
        V sum[NR], mi = broadcast(m[i][chunk]);
        for (int j = 0; j < NR; j++) sum[j] = minus[j];
#pragma GCC unroll 16
        for (int k = 0; k < STEPS; k++) {
          V ai = broadcast(a[i][chunk * STEPS + k]);
          for (int j = 0; j < NR; j++) sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(ai, panel[k * NR + j]));
        }
        for (int j = 0; j < NR; j++) acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(sum[j], mi));
      }
    }
  }
}
#endif

// ---------------------------------------------------------------------------------------------------- geometry

struct Shape {
  int64_t N, H, W, I, kh, kw, sh, sw, ph, pw;
  int64_t Hp() const { return H + 2 * ph; }
  int64_t Wp() const { return W + 2 * pw; }
  int64_t Ho() const { return (Hp() - kh) / sh + 1; }
  int64_t Wo() const { return (Wp() - kw) / sw + 1; }
  int64_t T() const { return N * Ho() * Wo(); }
  int64_t pixel(int64_t t) const {  // first pixel of output t's window, in the padded pictures
    int64_t n = t / (Ho() * Wo()), y = t / Wo() % Ho(), x = t % Wo();
    return (n * Hp() + y * sh) * Wp() + x * sw;
  }
  int64_t padded(int64_t p) const {  // input pixel p in the padded pictures
    return ((p / (H * W)) * Hp() + p / W % H + ph) * Wp() + p % W + pw;
  }
  Rows rows(const void* data, int64_t pixel_bytes) const {
    return {(const char*)data, kh, kw * pixel_bytes / 4, Wp() * pixel_bytes};
  }
};

static void window_rows(const Shape& s, const Rows& in, int64_t t, const char* row[MR]) {
  int64_t pixel_bytes = in.stride / s.Wp();
  for (int i = 0; i < MR; i++) row[i] = in.data + s.pixel(std::min(t + i, s.T() - 1)) * pixel_bytes;  // repeats are not stored
}

// -------------------------------------------------------------------------------------------------- quantize x

template <class T>
static void smoothed(const T* x, const float* inv, int64_t I, float* out) {
  if (inv)
    for (int64_t k = 0; k < I; k++) out[k] = to_float(x[k]) * inv[k];
  else
    for (int64_t k = 0; k < I; k++) out[k] = to_float(x[k]);
}

// quant.step_bound of every group; returns the largest. NaN wins every maximum, as bits of a positive number do.
static float bounds(const float* x, int64_t G, int64_t group, float* b) {
  uint32_t all = 0;
  for (int64_t g = 0; g < G; g++) {
    uint32_t most = 0;
    for (int64_t k = 0; k < group; k++) {
      float v = x[g * group + k];
      most = std::max(most, bits<uint32_t>(v * (v < 0 ? LO : HI)) & 0x7fffffff);
    }
    b[g] = bits<float>(most);
    all = std::max(all, most);
  }
  return bits<float>(all);
}

static float scale_of(float bound) {
  float s = bound * (1 / 16.f);
  return s < INFINITY ? std::max(s, TINY) : NAN;
}

static void quantize(const float* x, const float* b, float s, int64_t I, int64_t group, int64_t chunk, uint8_t* out,
                     int32_t* mult) {
  for (int64_t k0 = 0, g = 0; k0 < I; k0 += group, g++) {
    float m = std::min(std::max(std::ceil(b[g] / s), 1.f), 16.f), inv = 1 / (s * m);
    const int32_t mi = VNNI ? (int32_t)m : 1;
    const int64_t k1 = std::min(k0 + group, I);
    for (int64_t k = k0; k < k1; k++) {
      int32_t q = bits<int32_t>(x[k] * inv + MAGIC) - bits<int32_t>(MAGIC);
      out[k] = std::min(std::max(q, -8), 7) * mi + OFFSET;
    }
    for (int64_t k = k0; k < k1 && !VNNI; k += chunk) mult[k / chunk] = (int32_t)m * 0x10001;
  }
}

// ------------------------------------------------------------------------------------------------------ panels

// Weight row o -> its codes m q; returns their sum. Byte j of a row holds values j (low nibble) and j + K/2 (high).
static int32_t unpack_row(const uint8_t* codes, const uint8_t* mult, int64_t o, int64_t K, int64_t group, int8_t* out) {
  int32_t sum = 0;
  const uint8_t* p = codes + o * (K / 2);
  for (int64_t k0 = 0, at = o * (K / group); k0 < K; k0 += group, at++) {
    int32_t m = (mult[at / 2] >> 4 * (at % 2) & 15) + 1, part = 0;
    int64_t k1 = k0 + group, middle = std::min(std::max(K / 2, k0), k1);
    for (int64_t k = k0; k < middle; k++) {
      int32_t q = (p[k] & 15) - 8;
      out[k] = q * m, part += q;
    }
    for (int64_t k = middle; k < k1; k++) {
      int32_t q = (p[k - K / 2] >> 4) - 8;
      out[k] = q * m, part += q;
    }
    sum += part * m;
  }
  return sum;
}

// -8 times the weights of every chunk of a row, those of even and of odd pairs apart: as maddubs adds them.
static void minus_chunks(const int8_t* row, int64_t K, int64_t chunk, int16_t* out) {
  for (int64_t k0 = 0; k0 < K; k0 += chunk, out += 2) {
    int32_t pair[2] = {};
    for (int64_t k = k0; k < k0 + chunk; k++) pair[k / 2 % 2] += row[k];
    for (int i = 0; i < 2; i++) out[i] = -OFFSET * pair[i];
  }
}

template <class T> static void interleave(const T* row, int64_t lanes, int column, V* panel) {
  const int32_t* from = (const int32_t*)row;
  int32_t* to = (int32_t*)panel + column;
  for (int64_t k = 0; k < lanes; k++) to[k * WIDTH] = from[k];
}

static int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// ------------------------------------------------------------------------------------------------------ the op

template <class T, class Low, class Dot>  // Low: what the branch multiplies in, 4 / sizeof(Low) to a lane
static Tensor run(const Tensor& x, const Tensor& codes, const Tensor& mult, const Tensor& scale, const optional<Tensor>& bias,
                  const optional<Tensor>& A, const optional<Tensor>& B, const optional<Tensor>& inv_smooth, int64_t group,
                  int64_t group_x, bool per_sample, const Shape& s) {
  constexpr int64_t PACK = 4 / sizeof(Low);
  const int64_t taps = s.kh * s.kw, O = codes.size(0), K = codes.size(1) * 2, C = K / taps;
  const int64_t Ix = up(s.I, group_x), Gx = Ix / group_x;
  const int64_t P = s.N * s.H * s.W, rank = A ? A->size(0) : 0, R = up(rank, WIDTH), Cl = up(s.I, PACK);
  const int64_t pixels = s.N * s.Hp() * s.Wp();
  Tensor y = at::empty({s.N, s.Ho(), s.Wo(), O}, x.options());
  if (y.numel() == 0) return y;
  const T* px = x.const_data_ptr<T>();
  const float* inv = inv_smooth ? inv_smooth->const_data_ptr<float>() : nullptr;
  T* py = y.mutable_data_ptr<T>();

  // 1. codes X, multipliers Xm of their chunks (AVX2), scales, and x' for the branch
  bool border = s.ph || s.pw;
  const int64_t chunk = (group_x | C | 32) & -(group_x | C | 32);  // the largest power of two in all three
  const int64_t chunks = VNNI ? 0 : C / chunk;
  Tensor X = at::empty({pixels * C}, x.options().dtype(at::kByte)), L, low;
  Tensor Xm = at::empty({pixels * chunks}, x.options().dtype(at::kInt));
  uint8_t* pX = X.mutable_data_ptr<uint8_t>();
  int32_t* pXm = Xm.mutable_data_ptr<int32_t>();
  if (border || C > s.I) std::fill(pX, pX + pixels * C, OFFSET), std::fill(pXm, pXm + pixels * chunks, 0);
  bool as_is = std::is_same_v<T, Low> && !inv && !border && Cl == s.I;  // the branch can read x itself
  Low* pL = nullptr;
  if (rank && !as_is) {
    L = at::empty({pixels * Cl * (int64_t)sizeof(Low)}, x.options().dtype(at::kByte));
    pL = (Low*)L.mutable_data_ptr();
    if (border || Cl > s.I) std::fill(pL, pL + pixels * Cl, Low(0.f));
  }
  std::vector<float> scale_x(P);
  const auto each_pixel = [&](auto f) {  // f(pixel, x' (Ix), bounds of its groups, their largest)
    at::parallel_for(0, P, 8, [&](int64_t p0, int64_t p1) {
      std::vector<float> row(Ix), b(Gx);
      for (int64_t p = p0; p < p1; p++) {
        smoothed(px + p * s.I, inv, s.I, row.data());
        const float bound = bounds(row.data(), Gx, group_x, b.data());
        f(p, row.data(), b.data(), bound);
      }
    });
  };
  const auto quantize_pixel = [&](int64_t p, const float* row, const float* b, float) {
    quantize(row, b, scale_x[p], s.I, group_x, chunk, pX + s.padded(p) * C, pXm + s.padded(p) * chunks);
  };
  each_pixel([&](int64_t p, const float* row, const float* b, float bound) {
    scale_x[p] = per_sample ? bound : scale_of(bound);
    if (!per_sample) quantize_pixel(p, row, b, bound);
    if (pL)
      for (int64_t k = 0; k < s.I; k++) pL[s.padded(p) * Cl + k] = rounded<T, Low>(row[k]);
  });
  if (per_sample) {  // the scale is known only now: a second pass over x
    for (int64_t n = 0; n < s.N; n++) {
      uint32_t most = 0;
      for (int64_t p = n * s.H * s.W; p < (n + 1) * s.H * s.W; p++) most = std::max(most, bits<uint32_t>(scale_x[p]));
      std::fill_n(scale_x.begin() + n * s.H * s.W, s.H * s.W, scale_of(bits<float>(most)));
    }
    each_pixel(quantize_pixel);
  }

  // 2. low = x' A^T
  const int64_t tiles = up(s.T(), MR) / MR;
  if (rank) {
    const Rows in = s.rows(as_is ? (const void*)px : pL, Cl * sizeof(Low));
    const int64_t lanes = taps * Cl / PACK;
    std::vector<V> panel(R / WIDTH * lanes * NR, V{});
    std::vector<Low> row(taps * Cl, Low(0.f));
    const float* pA = A->const_data_ptr<float>();
    for (int64_t r = 0; r < rank; r++) {
      for (int64_t k = 0; k < taps * s.I; k++) row[k / s.I * Cl + k % s.I] = rounded<T, Low>(pA[r * taps * s.I + k]);
      interleave(row.data(), lanes, r % WIDTH, panel.data() + r / WIDTH * lanes * NR);
    }
    low = at::empty({tiles * MR * R * (int64_t)sizeof(Low)}, X.options());
    Low* plow = (Low*)low.mutable_data_ptr();
    at::parallel_for(0, tiles, 1, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; i++) {
        const char* at[MR];
        window_rows(s, in, i * MR, at);
        for (int64_t r = 0; r < R; r += WIDTH) {
          V acc[MR][NR] = {};
          tile<Dot>(at, in, panel.data() + r / WIDTH * lanes * NR, acc);
          for (int64_t m = 0; m < MR; m++)
            for (int64_t j = 0; j < WIDTH; j++) plow[(i * MR + m) * R + r + j] = rounded<T, Low>(((const float*)acc[m])[j]);
        }
      }
    });
  }

  // 3. threads share a grid of row ranges x column ranges; the best split leaves the least to the busiest thread
  const int64_t columns = up(O, WIDTH) / WIDTH, threads = at::get_num_threads();
  int64_t by_rows = 1, least = INT64_MAX;
  for (int64_t r = 1; r <= threads; r++)
    if (threads % r == 0)
      if (int64_t work = (up(tiles, r) / r) * (up(columns, threads / r) * r / threads); work < least) by_rows = r, least = work;
  const int64_t by_columns = threads / by_rows;
  const int64_t lanes = K / 4, lanes_chunk = taps * chunks, lanes_low = R / PACK;
  const int64_t wide = std::max<int64_t>(2, (256 << 10) / (lanes * 4 * WIDTH));
  const Rows in = s.rows(pX, C), in_mult = s.rows(pXm, chunks * 4);
  const Rows in_low{low.defined() ? (const char*)low.const_data_ptr() : nullptr, 1, lanes_low, 0};
  const uint8_t *pc = codes.const_data_ptr<uint8_t>(), *pm = mult.const_data_ptr<uint8_t>();
  const float *ps = scale.const_data_ptr<float>(), *pb = bias ? bias->const_data_ptr<float>() : nullptr;
  const float* pB = rank ? B->const_data_ptr<float>() : nullptr;
  const auto multiply = chunk == 32 ? tile_codes<8> : chunk == 16 ? tile_codes<4> : tile_codes<2>;
  at::parallel_for(0, threads, 1, [&](int64_t w0, int64_t w1) {
    std::vector<V> panel(wide * lanes * NR), panel_chunk(wide * lanes_chunk * NR), panel_low(wide * lanes_low * NR);
    std::vector<int8_t> row(K);
    std::vector<int16_t> row_chunk(2 * lanes_chunk);
    std::vector<Low> row_low(R, Low(0.f));
    std::vector<float> sw(wide * WIDTH), bw(wide * WIDTH);
    std::vector<int32_t> minus(wide * WIDTH);
    for (int64_t w = w0; w < w1; w++) {
      const int64_t wr = w / by_columns, wc = w % by_columns;
      const int64_t t0 = tiles * wr / by_rows, t1 = tiles * (wr + 1) / by_rows;
      for (int64_t c0 = columns * wc / by_columns, end = columns * (wc + 1) / by_columns; c0 < end; c0 += wide) {
        const int64_t c1 = std::min(c0 + wide, end);
        for (int64_t o = c0 * WIDTH; o < c1 * WIDTH; o++) {  // unpack: columns beyond O are zero
          const int64_t at = o - c0 * WIDTH, c = at / WIDTH;
          sw[at] = o < O ? ps[o] : 0, bw[at] = o < O && pb ? pb[o] : 0;
          int32_t sum = 0;
          if (o < O) sum = unpack_row(pc, pm, o, K, group, row.data());
          else std::fill(row.begin(), row.end(), 0);
          interleave(row.data(), lanes, at % WIDTH, panel.data() + c * lanes * NR);
          if (VNNI) minus[at] = -OFFSET * sum;
          else {
            minus_chunks(row.data(), K, chunk, row_chunk.data());
            interleave(row_chunk.data(), lanes_chunk, at % WIDTH, panel_chunk.data() + c * lanes_chunk * NR);
          }
          if (!rank) continue;
          for (int64_t r = 0; r < rank; r++) row_low[r] = rounded<T, Low>(o < O ? pB[o * rank + r] : 0.f);
          interleave(row_low.data(), lanes_low, at % WIDTH, panel_low.data() + c * lanes_low * NR);
        }
        for (int64_t i = t0; i < t1; i++) {
          const char *at[MR], *at_mult[MR], *at_low[MR];
          window_rows(s, in, i * MR, at);
          window_rows(s, in_mult, i * MR, at_mult);
          for (int m = 0; m < MR; m++) at_low[m] = in_low.data + (i * MR + m) * R * sizeof(Low);
          for (int64_t c = c0; c < c1; c++) {
            const int64_t o0 = c * WIDTH, p0 = (c - c0) * WIDTH, width = std::min<int64_t>(WIDTH, O - o0);
            V acc[MR][NR], branch[MR][NR] = {};
            for (int m = 0; m < MR; m++) std::copy_n((const V*)(minus.data() + p0), NR, acc[m]);
            const V *codes_c = panel.data() + (c - c0) * lanes * NR, *chunks_c = panel_chunk.data() + (c - c0) * lanes_chunk * NR;
            multiply(at, in, at_mult, in_mult, codes_c, chunks_c, acc);
            if (rank) tile<Dot>(at_low, in_low, panel_low.data() + (c - c0) * lanes_low * NR, branch);
            for (int64_t m = 0; m < std::min<int64_t>(MR, s.T() - i * MR); m++) {
              const int64_t t = i * MR + m, n = t / (s.Ho() * s.Wo());
              const float sx = scale_x[per_sample ? n * s.H * s.W : t];
              const int32_t* a = (const int32_t*)acc[m];
              const float* l = (const float*)branch[m];
              float v[WIDTH];
              for (int j = 0; j < WIDTH; j++) v[j] = (float)a[j] * sx * sw[p0 + j] + bw[p0 + j] + l[j];
              T* to = py + t * O + o0;
              if (width == WIDTH)
                for (int j = 0; j < WIDTH; j++) store(to + j, v[j]);
              else
                for (int64_t j = 0; j < width; j++) store(to + j, v[j]);
            }
          }
        }
      }
    }
  });
  return y;
}

// x (N, H, W, I) contiguous -> (N, H', W', O) in x's dtype. The arguments are those of kernels.w4a4_conv2d, A and B float32.
static Tensor w4a4(const Tensor& x, const Tensor& codes, const Tensor& mult, const Tensor& scale, const optional<Tensor>& bias,
                   const optional<Tensor>& A, const optional<Tensor>& B, const optional<Tensor>& inv_smooth, int64_t group,
                   int64_t group_x, bool per_sample, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  const Shape s{x.size(0), x.size(1), x.size(2), x.size(3), kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  const auto call = [&](auto f) { return f(x, codes, mult, scale, bias, A, B, inv_smooth, group, group_x, per_sample, s); };
  if (x.scalar_type() == at::kFloat) return call(run<float, float, Float>);
  if (x.scalar_type() == at::kHalf) return call(run<at::Half, float, Float>);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, "x must be float32, bfloat16 or float16, got ", x.scalar_type());
#ifdef __AVX512BF16__
  return call(run<at::BFloat16, at::BFloat16, Bfloat>);
#else
  return call(run<at::BFloat16, float, Float>);
#endif
}

TORCH_LIBRARY_FRAGMENT(cmquant, m) {
  m.def(
      "w4a4(Tensor x, Tensor codes, Tensor mult, Tensor scale, Tensor? bias, Tensor? A, Tensor? B, Tensor? inv_smooth, int group, "
      "int group_x, bool per_sample, int[2] kernel, int[2] stride, int[2] padding) -> Tensor");
  m.impl("w4a4", c10::DispatchKey::CPU, w4a4);
}
