// Views of stored frames on the CPU. The definition is in reference.py.
//
// Crop, resize and blur are separable: a pass along each axis. A pass is always the same loop, a
// row of results = a row + sum over neighbours of weight * (neighbour - row), with the vector
// running across the rows: no shuffles, any size, any number of taps, any instruction set. For
// the passes along x the image is turned first, 16 rows at a time:
//
//   frame --blend_rows--> 16 rows --turn--> columns of 16 --blend_columns, brightness--> plane
//   plane --contrast, gamma--> columns --blur--> --turn--> rows of the plane
//   rows --blur--> row --solarize, gain, speckle--> --normalise--> out
//
// Between the two halves stands contrast, which wants the mean of the whole view. The plane, 16
// bits a pixel, is the only image in memory (98 KiB at 224 x 224: level 2 cache).
//
// Whole numbers: kFine steps a grey level in the resize, kStep after it. The loops say
// `weight * (neighbour - row)`, rounded, so that a flat image stays exactly flat.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "clones.h"

namespace sslus::augment {
namespace {

constexpr int64_t kLanes = 16;  // rows turned together
constexpr int kFine = 128;      // steps of a grey level in the resize: 255 * 128 fits 16 bits
constexpr int kStep = 64;       // and after it: the sum of two pixels still does
constexpr int kWhite = 255 * kStep;
constexpr double kTolerance = 1e-3;  // pixels, as in reference.py

// The table of reference.py.
enum Column {
  kTop, kLeft, kHeight, kWidth, kFlip, kBrightness, kContrast, kGamma, kSigma,
  kSolarize, kGainNear, kGainFar, kSpeckle, kSeed, kColumns
};

// ------------------------------------------------------------------------------ vector loops

// round(x * weight / 2^15). Compilers know this form: pmulhrsw, sqrdmulh.
SSLUS_INLINE int16_t scaled(int16_t x, int16_t weight) {
  return static_cast<int16_t>((((int32_t{x} * weight) >> 14) + 1) >> 1);
}

// Which pixels of a frame make the pixels of a view, along one axis: weights[k * stride + o] of
// pixel start + first[o] + k. Weights in 2^-15 steps; the first of an o is 1 - its others.
struct Axis {
  int64_t start, span, taps, stride;
  const int32_t* first;
  const int16_t* weights;
};

// std::bit_cast of C++20; loops with memcpy in its place are not vectorised.
template <typename To, typename From>
SSLUS_INLINE To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

SSLUS_INLINE int16_t fine(int pixel) { return static_cast<int16_t>(pixel * kFine); }

// out = or += row 0 + sum of kOthers differences. Pixels come in as bytes.
template <int kOthers, bool kAdd>
SSLUS_INLINE void blend_row(const uint8_t* __restrict row, const uint8_t* const* others,
                            const int16_t* weights, int64_t weight_stride, int64_t n,
                            int16_t* __restrict out) {
  const uint8_t* from[kOthers + 1];
  int16_t weight[kOthers + 1];
  for (int k = 0; k < kOthers; ++k) from[k] = others[k], weight[k] = weights[k * weight_stride];
  for (int64_t i = 0; i < n; ++i) {
    int16_t sum = kAdd ? out[i] : fine(row[i]);
    for (int k = 0; k < kOthers; ++k)
      sum = static_cast<int16_t>(sum + scaled(fine(from[k][i] - row[i]), weight[k]));
    out[i] = sum;
  }
}

// num_rows rows of results, row y at out + y * out_stride, in kFine steps:
// sum_k weights[k * stride + y] * row (first[y] + k) of the image, where weights[0] is 1 - the
// others. A tap behind the image's last row has weight 0.
SSLUS_CLONES void blend_rows(const uint8_t* image, int64_t store, int64_t last, const Axis& axis,
                             int64_t y0, int64_t num_rows, int64_t n, int16_t* out,
                             int64_t out_stride) {
  const int64_t taps = axis.taps, stride = axis.stride;
  for (int64_t y = y0; y < y0 + num_rows; ++y, out += out_stride) {
    const int64_t first = axis.first[y];
    const int16_t* weights = axis.weights + y;
    const uint8_t *row = image + first * store, *rows[4];
    for (int64_t k = 1; k < taps || k == 1; k += 4) {
      const int64_t num = std::min<int64_t>(4, taps - k);
      for (int64_t j = 0; j < num; ++j) rows[j] = image + std::min(first + k + j, last) * store;
      const int16_t* w = weights + k * stride;
      switch (k > 1 ? num + 5 : num) {
        case 0: blend_row<0, false>(row, rows, w, stride, n, out); break;
        case 1: blend_row<1, false>(row, rows, w, stride, n, out); break;
        case 2: blend_row<2, false>(row, rows, w, stride, n, out); break;
        case 3: blend_row<3, false>(row, rows, w, stride, n, out); break;
        case 4: blend_row<4, false>(row, rows, w, stride, n, out); break;
        case 6: blend_row<1, true>(row, rows, w, stride, n, out); break;
        case 7: blend_row<2, true>(row, rows, w, stride, n, out); break;
        case 8: blend_row<3, true>(row, rows, w, stride, n, out); break;
        case 9: blend_row<4, true>(row, rows, w, stride, n, out); break;
      }
    }
  }
}

// kFine steps to kStep steps times a factor in 2^-14 steps, not above white.
SSLUS_INLINE int16_t brightened(int16_t x, uint16_t factor) {
  static_assert(kFine == 2 * kStep);
  const auto twice = static_cast<uint16_t>(x << 1);
  const auto y = static_cast<uint16_t>((uint32_t{twice} * factor) >> 16);
  return static_cast<int16_t>(y < kWhite ? y : kWhite);
}

// The same along x: kLanes rows of results for each column, weights[k * stride + x]. kLast: no tap
// is missing, so that brightness can follow.
template <int kOthers, bool kAdd, bool kLast>
SSLUS_INLINE void blend_columns_of(const int16_t* __restrict in, const int32_t* __restrict first,
                                   const int16_t* __restrict weights, int64_t stride, int64_t k0,
                                   uint16_t factor, int64_t n, int16_t* __restrict out) {
  for (int64_t x = 0; x < n; ++x) {
    const int16_t* from = in + first[x] * kLanes;
    const int16_t* to = from + k0 * kLanes;
    const int16_t* weight = weights + k0 * stride + x;
    for (int64_t i = 0; i < kLanes; ++i) {
      int16_t sum = kAdd ? out[x * kLanes + i] : from[i];
      for (int k = 0; k < kOthers; ++k)
        sum = static_cast<int16_t>(sum + scaled(static_cast<int16_t>(to[k * kLanes + i] - from[i]),
                                                weight[k * stride]));
      sum = sum > 0 ? sum : int16_t{0};
      out[x * kLanes + i] = kLast ? brightened(sum, factor) : sum;
    }
  }
}

SSLUS_CLONES void blend_columns(const int16_t* in, const int32_t* first, const int16_t* w,
                                int64_t stride, int64_t taps, uint16_t factor, int64_t n,
                                int16_t* out) {
  switch (taps) {
    case 1: return blend_columns_of<0, false, true>(in, first, w, stride, 1, factor, n, out);
    case 2: return blend_columns_of<1, false, true>(in, first, w, stride, 1, factor, n, out);
    case 3: return blend_columns_of<2, false, true>(in, first, w, stride, 1, factor, n, out);
    case 4: return blend_columns_of<3, false, true>(in, first, w, stride, 1, factor, n, out);
    case 5: return blend_columns_of<4, false, true>(in, first, w, stride, 1, factor, n, out);
  }
  blend_columns_of<4, false, false>(in, first, w, stride, 1, factor, n, out);
  int64_t k = 5;
  for (; k + 4 < taps; k += 4)
    blend_columns_of<4, true, false>(in, first, w, stride, k, factor, n, out);
  for (; k + 1 < taps; ++k)
    blend_columns_of<1, true, false>(in, first, w, stride, k, factor, n, out);
  blend_columns_of<1, true, true>(in, first, w, stride, k, factor, n, out);
}

// out = or += in + sum of kPairs of weights[k] * (in k steps before + in k steps after - 2 in).
template <int kPairs, bool kAdd>
SSLUS_INLINE void blur_of(const int16_t* __restrict in, int64_t step, const int16_t* weights,
                          int64_t k0, int64_t n, int16_t* __restrict out) {
  int16_t weight[kPairs];
  for (int k = 0; k < kPairs; ++k) weight[k] = weights[k0 + k];
  const int16_t *before = in - k0 * step, *after = in + k0 * step;
  for (int64_t i = 0; i < n; ++i) {
    int16_t sum = kAdd ? out[i] : in[i];
    const int twice = 2 * in[i];
    for (int k = 0; k < kPairs; ++k)
      sum = static_cast<int16_t>(
          sum + scaled(static_cast<int16_t>(before[i - k * step] + after[i + k * step] - twice),
                       weight[k]));
    out[i] = std::max<int16_t>(sum, 0);
  }
}

// Blur along the axis whose neighbours are `step` apart; weights[k] of those k away.
SSLUS_CLONES void blur(const int16_t* in, int64_t step, const int16_t* weights, int64_t radius,
                       int64_t n, int16_t* out) {
  switch (radius) {
    case 1: return blur_of<1, false>(in, step, weights, 1, n, out);
    case 2: return blur_of<2, false>(in, step, weights, 1, n, out);
    case 3: return blur_of<3, false>(in, step, weights, 1, n, out);
    case 4: return blur_of<4, false>(in, step, weights, 1, n, out);
    case 5: return blur_of<5, false>(in, step, weights, 1, n, out);
    default: blur_of<6, false>(in, step, weights, 1, n, out);
  }
  int64_t k = 7;
  for (; k + 3 <= radius + 1; k += 3) blur_of<3, true>(in, step, weights, k, n, out);
  for (; k <= radius; ++k) blur_of<1, true>(in, step, weights, k, n, out);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SSLUS_SHUFFLES
#endif
#endif

#if defined(SSLUS_SHUFFLES)
// Vectors of 8 and 16 pixels in the compilers' own notation, at any address.
typedef int16_t Eight __attribute__((vector_size(16), aligned(2), may_alias));
typedef int16_t Sixteen __attribute__((vector_size(32), aligned(2), may_alias));

// Three rounds of this turn an 8 x 8 square; in Sixteen, two squares side by side.
#define SSLUS_INTERLEAVE(from, to, low, high)                             \
  for (int i = 0; i < 4; ++i) {                                           \
    to[2 * i] = __builtin_shufflevector(from[i], from[i + 4], low);       \
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 4], high);  \
  }
#define SSLUS_LOW 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27
#define SSLUS_HIGH 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31
#define SSLUS_JOIN 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15

// kLanes rows -> columns of kLanes pixels; n, a multiple of 8, columns.
SSLUS_CLONES void to_columns(const int16_t* rows, int64_t stride, int64_t n, int16_t* columns) {
  for (int64_t x = 0; x < n; x += 8) {
    Sixteen a[8], b[8];
    for (int i = 0; i < 8; ++i) {
      const auto above = *reinterpret_cast<const Eight*>(rows + i * stride + x);
      const auto below = *reinterpret_cast<const Eight*>(rows + (i + 8) * stride + x);
      a[i] = __builtin_shufflevector(above, below, SSLUS_JOIN);
    }
    SSLUS_INTERLEAVE(a, b, SSLUS_LOW, SSLUS_HIGH)
    SSLUS_INTERLEAVE(b, a, SSLUS_LOW, SSLUS_HIGH)
    SSLUS_INTERLEAVE(a, b, SSLUS_LOW, SSLUS_HIGH)
    for (int i = 0; i < 8; ++i)
      *reinterpret_cast<Sixteen*>(columns + (x + i) * kLanes) = b[i];
  }
}

// And back.
SSLUS_CLONES void to_rows(const int16_t* columns, int64_t n, int16_t* rows, int64_t stride) {
  for (int64_t x = 0; x < n; x += 8) {
    Sixteen a[8], b[8];
    for (int i = 0; i < 8; ++i)
      a[i] = *reinterpret_cast<const Sixteen*>(columns + (x + i) * kLanes);
    SSLUS_INTERLEAVE(a, b, SSLUS_LOW, SSLUS_HIGH)
    SSLUS_INTERLEAVE(b, a, SSLUS_LOW, SSLUS_HIGH)
    SSLUS_INTERLEAVE(a, b, SSLUS_LOW, SSLUS_HIGH)
    for (int i = 0; i < 8; ++i) {
      *reinterpret_cast<Eight*>(rows + i * stride + x) =
          __builtin_shufflevector(b[i], b[i], 0, 1, 2, 3, 4, 5, 6, 7);
      *reinterpret_cast<Eight*>(rows + (i + 8) * stride + x) =
          __builtin_shufflevector(b[i], b[i], 8, 9, 10, 11, 12, 13, 14, 15);
    }
  }
}

#else  // the same without the vectors that older compilers lack, at a quarter of the speed
void to_columns(const int16_t* rows, int64_t stride, int64_t n, int16_t* columns) {
  for (int64_t x = 0; x < n; ++x)
    for (int64_t y = 0; y < kLanes; ++y) columns[x * kLanes + y] = rows[y * stride + x];
}

void to_rows(const int16_t* columns, int64_t n, int16_t* rows, int64_t stride) {
  for (int64_t y = 0; y < kLanes; ++y)
    for (int64_t x = 0; x < n; ++x) rows[y * stride + x] = columns[x * kLanes + y];
}
#endif

// The product with `one` lets compilers add pairs while they widen: pmaddwd.
SSLUS_CLONES int64_t total(const int16_t* in, int64_t n, int16_t one) {
  constexpr int64_t chunk = 65536;  // times white < 2^31
  int64_t sum = 0;
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t stop = std::min(n, start + chunk);
    int32_t part = 0;
    for (int64_t i = start; i < stop; ++i) part += int32_t{in[i]} * one;
    sum += part;
  }
  return sum;
}

// min(white, max(0, factor * x + add)); factor in 2^-14 steps, at most 3 (bounds of the table).
// Unsigned 16 bits hold it all: 3 * white < 2^16, and what is taken away is cut at 0 first.
SSLUS_CLONES void stretch(int16_t* row, uint16_t factor, int add, int64_t n) {
  const auto least = static_cast<uint16_t>(std::min(65535, std::max(0, -add)));
  const auto offset = static_cast<uint16_t>(add < 0 ? -int{least} : add);
  for (int64_t i = 0; i < n; ++i) {
    const auto x = static_cast<uint16_t>(row[i] << 2);
    const auto y = static_cast<uint16_t>((uint32_t{x} * factor) >> 16);
    const auto z = static_cast<uint16_t>((y > least ? y : least) + offset);
    row[i] = static_cast<int16_t>(z < kWhite ? z : kWhite);
  }
}

// white * (x / white)^gamma, as 2^(gamma log2 x): off by less than 0.03 grey levels.
SSLUS_CLONES void power(int16_t* row, float gamma, int64_t n, float lowest) {
  for (int64_t i = 0; i < n; ++i) {
    // x = 2^whole * m with m in sqrt(1/2)..sqrt(2); log2 m / (m - 1) is a polynomial.
    const auto bits = bit_cast<int32_t>(static_cast<float>(row[i]) * (1.0f / kWhite));
    const int32_t whole = (bits - 0x3f3504f3) >> 23;
    const auto m = bit_cast<float>(bits - whole * (1 << 23));
    const float s = m - 1;
    const float log2 =
        static_cast<float>(whole) +
        s * (1.4426476f +
             s * (-0.72054121f + s * (0.48521406f + s * (-0.39112317f + s * 0.25566687f))));
    // 2^t = 2^near * 2^rest with rest in -1/2..1/2, where the exponential series is short.
    // `lowest`, -100, is an argument because compilers make a branch of the constant.
    // Black has whole = -127: 2^t rounds to black again for every gamma of the table.
    const float product = gamma * log2, t = product > lowest ? product : lowest;
    const auto near = static_cast<int32_t>(t - 0.5f);
    const float r = (t - static_cast<float>(near)) * 0.69314718f;
    const float rest = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * 0.041666668f)));
    const auto scale = bit_cast<float>((near + 127) * (1 << 23));
    row[i] = static_cast<int16_t>(kWhite * (scale * rest) + 0.5f);
  }
}

SSLUS_CLONES void invert_from(int16_t* row, int16_t threshold, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    row[i] = static_cast<int16_t>(row[i] >= threshold ? kWhite - row[i] : row[i]);
}

// The sum of the word's four bytes less its mean.
SSLUS_INLINE float noise_of(uint32_t word) {
  const uint32_t pairs = (word & 0xff00ff) + ((word >> 8) & 0xff00ff);
  return static_cast<float>(static_cast<int32_t>((pairs & 0xffff) + (pairs >> 16)) - 510);
}

// Row y of the noise of reference.py: one call of Philox4x32-10 for four pixels.
SSLUS_CLONES void make_noise(uint32_t seed, uint32_t y, int64_t num_calls,
                             float* __restrict noise) {
  for (int64_t x = 0; x < num_calls; ++x) {
    uint32_t a = static_cast<uint32_t>(x), b = y, c = 0, d = 0, k0 = seed, k1 = 0;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10  // or the loop over x, which has loops inside, is not vectorised
#endif
    for (int round = 0; round < 10; ++round) {
      const uint64_t p = uint64_t{a} * 0xD2511F53u, q = uint64_t{c} * 0xCD9E8D57u;
      a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
      b = static_cast<uint32_t>(q);
      c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
      d = static_cast<uint32_t>(p);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    noise[4 * x] = noise_of(a);
    noise[4 * x + 1] = noise_of(b);
    noise[4 * x + 2] = noise_of(c);
    noise[4 * x + 3] = noise_of(d);
  }
}

SSLUS_CLONES void speckle(int16_t* __restrict row, const float* __restrict noise, float strength,
                          float white, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = static_cast<float>(row[i]) * (1 + strength * noise[i]);
    const float least = x > 0 ? x : 0;
    row[i] = static_cast<int16_t>((least < white ? least : white) + 0.5f);
  }
}

SSLUS_CLONES void normalise(const int16_t* __restrict row, float scale, float shift, int64_t n,
                            float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(row[i]) * scale + shift;
}

// float32 to bfloat16, to the nearest, ties to even.
SSLUS_CLONES void halve(const float* __restrict in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = bit_cast<uint32_t>(in[i]);
    out[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

// The same, past the caches, which the next frames need more than what has just been written.
// `out` at a multiple of 32 bytes, n a multiple of 16.
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2,fma"))) void normalise_past_caches(const int16_t* row, float scale,
                                                               float shift, int64_t n,
                                                               float* out) {
  const __m256 a = _mm256_set1_ps(scale), b = _mm256_set1_ps(shift);
  const __m256i zero = _mm256_setzero_si256();  // behind a pixel: widens it, half as dear as a cvt
  for (int64_t i = 0; i < n; i += 16) {
    const __m256i x = _mm256_permute4x64_epi64(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)), 0b11011000);
    const __m256 low = _mm256_cvtepi32_ps(_mm256_unpacklo_epi16(x, zero));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_unpackhi_epi16(x, zero));
    _mm256_stream_ps(out + i, _mm256_fmadd_ps(low, a, b));
    _mm256_stream_ps(out + i + 8, _mm256_fmadd_ps(high, a, b));
  }
}

[[maybe_unused]] bool can_pass_caches() {
  static const bool can = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return can;
}
#else
const auto normalise_past_caches = normalise;

[[maybe_unused]] bool can_pass_caches() { return false; }
#endif

// --------------------------------------------------------------------------------- one view

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of a thread, kept between calls. Starts as zeros, and on a cache line.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  T* at_least(int64_t n) {
    if (n > size_) {
      release();
      const auto num_bytes = static_cast<size_t>(n) * sizeof(T);
      data_ = static_cast<T*>(::operator new(num_bytes, std::align_val_t{64}));
      std::memset(data_, 0, num_bytes);
      size_ = n;
    }
    return data_;
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr, size_ = 0;
  }

  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct AxisBuffers {
  Buffer<int32_t> first;
  Buffer<int16_t> weights;
  Buffer<float> share, distance, sum;
};

SSLUS_CLONES void triangle(double centre, double step, double support, int64_t offset,
                           int64_t span, int64_t taps, int64_t count, int64_t stride,
                           int32_t* __restrict first, float* __restrict distance,
                           float* __restrict sum, float* __restrict share,
                           int16_t* __restrict weights) {
  // Only 32-bit integers become doubles and back in vectors everywhere.
  const auto num = static_cast<int32_t>(count);
  for (int32_t o = 0; o < num; ++o) {
    const double c = centre + step * o;
    int32_t f = static_cast<int32_t>(c - support + 0.5);  // the first weight > 0
    f = f > 0 ? f : 0;
    distance[o] = static_cast<float>(f + 0.5 - c);
    first[o] = f;
    sum[o] = 0;
  }
  const auto slope = static_cast<float>(1 / support);
  const auto end = static_cast<int32_t>(span);
  for (int32_t k = 0; k < taps; ++k)
    for (int64_t o = 0; o < count; ++o) {
      float s = 1 - std::fabs(distance[o] + static_cast<float>(k)) * slope;
      s = s > 0 && first[o] + k < end ? s : 0;
      share[k * stride + o] = s;
      sum[o] += s;
    }
  for (int64_t o = 0; o < count; ++o) sum[o] = 32768 / sum[o];
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t o = 0; o < count; ++o) {
      const float w = share[k * stride + o] * sum[o] + 0.5f;
      weights[k * stride + o] = static_cast<int16_t>(w < 32767 ? w : 32767);
    }
  for (int64_t o = 0; o < count; ++o) first[o] += static_cast<int32_t>(offset);
}

// The triangle filter of reference.py for the box start..start + length and `count` pixels.
// `whole` widens what is read to a multiple of that where the frame allows it: whole vectors.
Axis make_axis(AxisBuffers& buffers, double start, double length, int64_t store, int64_t count,
               bool reverse, int64_t whole) {
  const double scale = length / static_cast<double>(count), support = std::max(scale, 1.0);
  const auto low = static_cast<int64_t>(std::floor(start + kTolerance));
  const auto high = std::min(store, static_cast<int64_t>(std::ceil(start + length - kTolerance)));
  Axis axis;
  axis.span = std::min(store, round_up(high - low, whole));
  axis.start = std::min(low, store - axis.span);
  axis.taps = std::min(static_cast<int64_t>(std::ceil(2 * support)), high - low);
  axis.stride = round_up(count, 16);
  auto* first = buffers.first.at_least(count);
  auto* weights = buffers.weights.at_least(axis.taps * axis.stride);
  const double centre = start - static_cast<double>(low) + scale / 2;
  const double step = reverse ? -scale : scale;
  triangle(reverse ? centre + scale * static_cast<double>(count - 1) : centre, step, support,
           low - axis.start, high - low, axis.taps, count, axis.stride, first,
           buffers.distance.at_least(count), buffers.sum.at_least(count),
           buffers.share.at_least(axis.taps * axis.stride), weights);
  axis.first = first;
  axis.weights = weights;
  return axis;
}

struct Gaussian {
  int64_t radius = 0;
  int16_t weights[64];  // of pixels that are 1, 2, ... away; sigma <= 16: at most 48
};

Gaussian gaussian(double sigma, int64_t count) {
  Gaussian g;
  g.radius = std::min(static_cast<int64_t>(std::ceil(3 * sigma)), count - 1);
  double sum = 1, share[64];
  for (int64_t k = 1; k <= g.radius; ++k) {
    const double x = static_cast<double>(k) / sigma;
    share[k] = std::exp(-0.5 * x * x);
    sum += 2 * share[k];
  }
  for (int64_t k = 1; k <= g.radius; ++k)
    g.weights[k] = static_cast<int16_t>(std::lround(32768 * share[k] / sum));
  while (g.radius > 0 && g.weights[g.radius] == 0) --g.radius;
  return g;
}

struct Scratch {
  AxisBuffers rows, columns;
  Buffer<int16_t> middle, turned, plane, columns_blurred, image, rows_blurred;
  Buffer<float> noise;
};

struct Job {
  const uint8_t* frames;
  const int64_t* index;
  const float* params;
  char* out;
  int64_t store, height, width;
  float scale, shift;  // result = step * scale + shift
  bool half;           // bfloat16, else float32
  bool past_caches;    // float32 only, where can_pass_caches()
};

// The first half: crop, resize, flip and brightness, to blocks of kLanes rows, each as width
// columns of kLanes pixels, `block_stride` apart. Rows below the view's last are 0. Returns the
// sum of all pixels where contrast will want it.
int64_t resample(const Job& job, int64_t v, Scratch& scratch, int16_t* block,
                 int64_t block_stride) {
  const float* p = job.params + v * kColumns;
  const int64_t store = job.store, height = job.height, width = job.width;
  const Axis down = make_axis(scratch.rows, p[kTop], p[kHeight], store, height, false, 1);
  const Axis across =
      make_axis(scratch.columns, p[kLeft], p[kWidth], store, width, p[kFlip] > 0, 32);
  const uint8_t* image = job.frames + (job.index[v] * store + down.start) * store + across.start;

  const int64_t stride = round_up(across.span, 32);
  int16_t* middle = scratch.middle.at_least(kLanes * stride);
  int16_t* turned = scratch.turned.at_least((stride + across.taps) * kLanes);
  const auto factor = static_cast<uint16_t>(std::lround(p[kBrightness] * 16384));
  const bool needs_mean = p[kContrast] != 1;
  int64_t sum = 0;
  for (int64_t y = 0; y < height; y += kLanes, block += block_stride) {
    const int64_t num_rows = std::min(kLanes, height - y);
    blend_rows(image, store, down.span - 1, down, y, num_rows, across.span, middle, stride);
    std::fill_n(middle + num_rows * stride, (kLanes - num_rows) * stride, int16_t{0});
    to_columns(middle, stride, stride, turned);
    blend_columns(turned, across.first, across.weights, across.stride, across.taps, factor, width,
                  block);
    if (needs_mean) sum += total(block, width * kLanes, 1);
  }
  return sum;
}

// The last steps, for rows y.. of a view: solarize, gain, speckle, normalisation. Overwrites them.
void finish(const Job& job, int64_t v, int64_t y, int64_t num_rows, int16_t* rows, int64_t stride,
            Scratch& scratch) {
  const float* p = job.params + v * kColumns;
  int64_t width = job.width;
  char* out = job.out + (v * job.height + y) * width * (job.half ? 2 : 4);
  if (p[kSolarize] <= 1)
    invert_from(rows, static_cast<int16_t>(std::ceil(p[kSolarize] * kWhite)), num_rows * stride);
  for (int64_t i = 0; i < num_rows; ++i) {
    int16_t* row = rows + i * stride;
    if (p[kGainNear] != 1 || p[kGainFar] != 1) {
      const double depth = (static_cast<double>(y + i) + 0.5) / static_cast<double>(job.height);
      const double gain = p[kGainNear] + (p[kGainFar] - p[kGainNear]) * depth;
      stretch(row, static_cast<uint16_t>(std::lround(gain * 16384)), 0, width);
    }
    if (p[kSpeckle] > 0) {
      constexpr float deviation = 147.80054f;  // sqrt(21845): of the sum of four bytes
      const int64_t num_calls = (width + 3) / 4;
      float* noise = scratch.noise.at_least(4 * num_calls);
      make_noise(static_cast<uint32_t>(p[kSeed]), static_cast<uint32_t>(y + i), num_calls, noise);
      speckle(row, noise, p[kSpeckle] / deviation, kWhite, width);
    }
  }
  // Rows without gaps are one long row, made in pieces that stay in the fastest cache.
  if (stride == width) width *= num_rows, num_rows = 1;
  for (int64_t i = 0; i < num_rows; ++i, rows += stride) {
    if (job.half) {
      constexpr int64_t piece = 1024;
      float floats[piece];
      auto* to = reinterpret_cast<uint16_t*>(out) + i * width;
      for (int64_t x = 0; x < width; x += piece) {
        const int64_t n = std::min(piece, width - x);
        normalise(rows + x, job.scale, job.shift, n, floats);
        halve(floats, n, to + x);
      }
    } else {
      auto* to = reinterpret_cast<float*>(out) + i * width;
      if (job.past_caches && width % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 32 == 0)
        normalise_past_caches(rows, job.scale, job.shift, width, to);
      else
        normalise(rows, job.scale, job.shift, width, to);
    }
  }
}

// Neighbours before the first and behind the last one, mirrored at them; `step` pixels each.
void mirror_start(int16_t* first, int64_t step, int64_t radius) {
  for (int64_t k = 1; k <= radius; ++k)
    std::memcpy(first - k * step, first + k * step, static_cast<size_t>(step) * 2);
}

void mirror_end(int16_t* last, int64_t step, int64_t radius) {
  for (int64_t k = 1; k <= radius; ++k)
    std::memcpy(last + k * step, last - k * step, static_cast<size_t>(step) * 2);
}

void make_view(const Job& job, int64_t v, Scratch& scratch) {
  const float* p = job.params + v * kColumns;
  const int64_t height = job.height, width = job.width, stride = round_up(width, 16);
  const Gaussian across = gaussian(p[kSigma], width), down = gaussian(p[kSigma], height);
  const int64_t blocks = (height + kLanes - 1) / kLanes;
  const int64_t block_stride = (stride + 2 * across.radius) * kLanes;
  int16_t* plane = scratch.plane.at_least(blocks * block_stride) + across.radius * kLanes;
  const int64_t sum = resample(job, v, scratch, plane, block_stride);

  // The second half. Without a blur along y a block's rows are final, and the next block's take
  // their place; with one, all rows are kept, and those done lag behind by the radius.
  const double mean = static_cast<double>(sum) / static_cast<double>(height * width);
  const auto factor = static_cast<uint16_t>(std::lround(p[kContrast] * 16384));
  const int add = static_cast<int>(std::lround((1 - p[kContrast]) * mean));
  const int64_t kept = down.radius > 0 ? blocks * kLanes + 2 * down.radius : kLanes;
  int16_t* image = scratch.image.at_least(kept * stride) + down.radius * stride;
  int16_t* columns_blurred = scratch.columns_blurred.at_least(stride * kLanes);
  int64_t done = 0;
  for (int64_t y = 0; y < height; y += kLanes, plane += block_stride) {
    const int16_t* columns = plane;
    if (p[kContrast] != 1) stretch(plane, factor, add, width * kLanes);
    if (p[kGamma] != 1) power(plane, p[kGamma], width * kLanes, -100);
    if (across.radius > 0) {
      mirror_start(plane, kLanes, across.radius);
      mirror_end(plane + (width - 1) * kLanes, kLanes, across.radius);
      blur(plane, kLanes, across.weights, across.radius, width * kLanes, columns_blurred);
      columns = columns_blurred;
    }
    int16_t* rows = image + (down.radius > 0 ? y * stride : 0);
    to_rows(columns, round_up(width, 8), rows, stride);
    if (down.radius == 0) {
      finish(job, v, y, std::min(kLanes, height - y), rows, stride, scratch);
      continue;
    }
    const int64_t ready = y + kLanes >= height ? height : y + kLanes - down.radius;
    if (ready <= done) continue;
    if (done == 0) mirror_start(image, stride, down.radius);
    if (ready == height) mirror_end(image + (height - 1) * stride, stride, down.radius);
    int16_t* blurred = scratch.rows_blurred.at_least((ready - done) * stride);
    blur(image + done * stride, stride, down.weights, down.radius, (ready - done) * stride, blurred);
    finish(job, v, done, ready - done, blurred, stride, scratch);
    done = ready;
  }
}

}  // namespace
}  // namespace sslus::augment
