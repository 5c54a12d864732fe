// Loops in AVX2 and AVX-512 for which compilers do not find the instructions.
//
// Each gives the same bits as a loop of loops.h or across.h, which is used on other processors.
#pragma once
#include <cstdint>

#include "augment/loops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__)  // GCC 12 warns of its own header
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#define SSLUS_AVX2 __attribute__((target("avx2,fma")))
#define SSLUS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi")))
#endif

namespace sslus::augment {
namespace {

// What the loops below may use; kAvx512 includes VBMI (Intel since Ice Lake, AMD since Zen 4).
enum class Vectors { kCompilers, kAvx2, kAvx512 };

// The number of results of look_up that share a window; 0: there is no look_up.
constexpr int64_t group_of(Vectors vectors) {
  return vectors == Vectors::kAvx512 ? 32 : vectors == Vectors::kAvx2 ? 8 : 0;
}

#if defined(SSLUS_AVX2)
[[maybe_unused]] Vectors widest() {
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vbmi");
  return !avx2 ? Vectors::kCompilers : avx512 ? Vectors::kAvx512 : Vectors::kAvx2;
}

// ---------------------------------------------------------------------- resize_across (across.h)

// A row of a frame is requested while the row this many before it is processed: a frame is usually
// not in the caches, and the processor does not guess ahead far enough.
constexpr int64_t kAhead = 8;

// Loads 16 bytes into each half of a vector.
SSLUS_AVX2 inline __m256i two_windows(const uint8_t* low, const uint8_t* high) {
  return _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// Computes 8 results from the 16 or (kFar) 32 pixels of their window. A shuffle index with its
// highest bit set yields 0: this widens bytes to words, and selects between `near` and `far`.
// kTaps: the number of taps, or 0 for any.
template <bool kFar, int kTaps>
SSLUS_AVX2 void look_up(const uint8_t* rows, int64_t row_stride, int64_t num_rows,
                        const Axis& axis, int16_t* out) {
  const __m256i one = _mm256_set1_epi16(1), far_away = _mm256_set1_epi16(0x80);
  const int64_t n = axis.stride, taps = kTaps > 0 ? kTaps : axis.taps;
  for (int64_t y = 0; y < num_rows; ++y, rows += row_stride, out += n)
    for (int64_t x = 0; x < n; x += 16) {
      const uint8_t *low = rows + axis.windows[x / 8], *high = rows + axis.windows[x / 8 + 1];
      __builtin_prefetch(low + kAhead * row_stride);
      const __m256i near = two_windows(low, high);
      const __m256i far = kFar ? two_windows(low + 16, high + 16) : near;
      __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(axis.places + x));
      __m256i first = _mm256_shuffle_epi8(near, place);
      if (kFar)  // 0x70 + p becomes p - 16
        first = _mm256_or_si256(first,
                                _mm256_shuffle_epi8(far, _mm256_sub_epi8(place, far_away)));
      __m256i sum = _mm256_slli_epi16(first, 7);
      for (int64_t k = 1; k < taps; ++k) {
        place = _mm256_add_epi16(place, one);
        __m256i other = _mm256_shuffle_epi8(near, place);
        if (kFar)
          other = _mm256_or_si256(other,
                                  _mm256_shuffle_epi8(far, _mm256_sub_epi8(place, far_away)));
        const __m256i weights =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(axis.weights + k * n + x));
        const __m256i difference = _mm256_slli_epi16(_mm256_sub_epi16(other, first), 7);
        sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(difference, weights));
      }
      if (kTaps != 2) sum = _mm256_max_epi16(sum, _mm256_setzero_si256());  // two: between them
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + x), sum);
    }
}

// Computes 32 results from the 64 or (kFar) 128 pixels of their window.
template <bool kFar, int kTaps>
SSLUS_AVX512 void look_up_32(const uint8_t* rows, int64_t row_stride, int64_t num_rows,
                             const Axis& axis, int16_t* out) {
  const __m512i one = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
  const int64_t n = axis.stride, taps = kTaps > 0 ? kTaps : axis.taps;
  for (int64_t y = 0; y < num_rows; ++y, rows += row_stride, out += n)
    for (int64_t x = 0; x < n; x += 32) {
      const uint8_t* pixels = rows + axis.windows[x / 32];
      __builtin_prefetch(pixels + kAhead * row_stride);
      const __m512i near = _mm512_loadu_si512(pixels);
      const __m512i far = kFar ? _mm512_loadu_si512(pixels + 64) : near;
      const auto at = [&](__m512i place) SSLUS_AVX512 {
        constexpr __mmask64 kEven = 0x5555555555555555;  // the upper halves of the words are 0
        return kFar ? _mm512_maskz_permutex2var_epi8(kEven, near, place, far)
                    : _mm512_maskz_permutexvar_epi8(kEven, place, near);
      };
      __m512i place = _mm512_load_si512(axis.places + x);
      const __m512i first = at(place);
      __m512i sum = _mm512_slli_epi16(first, 7);
      for (int64_t k = 1; k < taps; ++k) {
        place = _mm512_add_epi16(place, one);
        const __m512i difference = _mm512_slli_epi16(_mm512_sub_epi16(at(place), first), 7);
        const __m512i weights = _mm512_load_si512(axis.weights + k * n + x);
        sum = _mm512_add_epi16(sum, _mm512_mulhrs_epi16(difference, weights));
      }
      if (kTaps != 2) sum = _mm512_max_epi16(sum, zero);  // two: the sum lies between them
      _mm512_store_si512(out + x, sum);
    }
}

// Returns false if this is not possible.
bool look_up(const uint8_t* rows, int64_t row_stride, int64_t num_rows, const Axis& axis,
             int16_t* out) {
  const auto by = axis.reach == 16    ? axis.taps == 2   ? look_up<false, 2>
                                        : axis.taps == 3 ? look_up<false, 3>
                                                         : look_up<false, 0>
                  : axis.reach == 32  ? look_up<true, 0>
                  : axis.reach == 64  ? axis.taps == 2   ? look_up_32<false, 2>
                                        : axis.taps == 3 ? look_up_32<false, 3>
                                                         : look_up_32<false, 0>
                  : axis.reach == 128 ? look_up_32<true, 0>
                                      : nullptr;
  if (by != nullptr) by(rows, row_stride, num_rows, axis, out);
  return by != nullptr;
}

// --------------------------------------------------------------------------- blend_rows (loops.h)

// Returns the sum of the first `count` pixels of each row, the last n - count < 32 being padding.
template <int kTaps>
SSLUS_AVX512 int64_t blend_rows(const int16_t* rows, int64_t ring, const Axis& axis,
                                uint16_t factor, int64_t y0, int64_t y1, int64_t n, int64_t count,
                                int16_t* out, int64_t out_stride) {
  const __m512i times = _mm512_set1_epi16(static_cast<int16_t>(factor));
  const __m512i white = _mm512_set1_epi16(kWhite), zero = _mm512_setzero_si512();
  const __m512i one = _mm512_set1_epi16(1);
  const __mmask32 counted = ~__mmask32{0} >> (n - count);
  __m512i total = zero;  // of 64 bits
  for (int64_t y = y0; y < y1; ++y, out += out_stride) {
    __m512i pairs = zero, pixels = zero;
    const int16_t* row[kTaps];
    __m512i weight[kTaps];
    for (int k = 0; k < kTaps; ++k) {
      row[k] = rows + ((axis.first[y] + k) & ring) * n;
      weight[k] = _mm512_set1_epi16(axis.weights[k * axis.stride + y]);
    }
    for (int64_t x = 0; x < n; x += 32) {
      const __m512i first = _mm512_load_si512(row[0] + x);
      __m512i sum = first;
      for (int k = 1; k < kTaps; ++k) {
        const __m512i difference = _mm512_sub_epi16(_mm512_load_si512(row[k] + x), first);
        sum = _mm512_add_epi16(sum, _mm512_mulhrs_epi16(difference, weight[k]));
      }
      if (kTaps > 2) sum = _mm512_max_epi16(sum, zero);  // two: the sum lies between them
      pairs = _mm512_add_epi32(pairs, _mm512_madd_epi16(pixels, one));
      sum = _mm512_mulhi_epu16(_mm512_slli_epi16(sum, 1), times);
      pixels = _mm512_min_epu16(sum, white);
      _mm512_store_si512(out + x, pixels);
    }
    pixels = _mm512_maskz_mov_epi16(counted, pixels);
    pairs = _mm512_add_epi32(pairs, _mm512_madd_epi16(pixels, one));
    total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(pairs)));
    total = _mm512_add_epi64(total, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(pairs, 1)));
  }
  return _mm512_reduce_add_epi64(total);
}

// --------------------------------------------------------------------------------- blur (loops.h)

// A vector of results from the 2 kRadius + 1 vectors of their neighbours.
template <int kRadius>
SSLUS_AVX512 inline __m512i blurred(const __m512i* pixels, const __m512i* weights) {
  const __m512i pixel = pixels[kRadius], twice = _mm512_add_epi16(pixel, pixel);
  __m512i sum = pixel;
  for (int k = 1; k <= kRadius; ++k) {
    const __m512i pair = _mm512_add_epi16(pixels[kRadius - k], pixels[kRadius + k]);
    const __m512i difference = _mm512_sub_epi16(pair, twice);
    sum = _mm512_add_epi16(sum, _mm512_mulhrs_epi16(difference, weights[k]));
  }
  return _mm512_max_epi16(sum, _mm512_setzero_si512());
}

template <int kRadius>
SSLUS_AVX512 void blur_across(const int16_t* in, int64_t in_stride, const int16_t* weights,
                              int64_t num_rows, int64_t n, int16_t* out, int64_t out_stride) {
  __m512i weight[kRadius + 1], pixels[2 * kRadius + 1];
  for (int k = 1; k <= kRadius; ++k) weight[k] = _mm512_set1_epi16(weights[k]);
  for (int64_t y = 0; y < num_rows; ++y, in += in_stride, out += out_stride)
    for (int64_t x = 0; x < n; x += 32) {
      for (int k = -kRadius; k <= kRadius; ++k)
        pixels[kRadius + k] = _mm512_loadu_si512(in + x + k);
      _mm512_store_si512(out + x, blurred<kRadius>(pixels, weight));
    }
}

// Column by column of vectors: every pixel is loaded once.
template <int kRadius>
SSLUS_AVX512 void blur_down(const int16_t* in, int64_t in_stride, const int16_t* weights,
                            int64_t num_rows, int64_t n, int16_t* out, int64_t out_stride) {
  __m512i weight[kRadius + 1], pixels[2 * kRadius + 1];
  for (int k = 1; k <= kRadius; ++k) weight[k] = _mm512_set1_epi16(weights[k]);
  for (int64_t x = 0; x < n; x += 32) {
    const int16_t* next = in + x - kRadius * in_stride;
    int16_t* to = out + x;
    for (int k = 0; k < 2 * kRadius; ++k, next += in_stride) pixels[k] = _mm512_load_si512(next);
    for (int64_t y = 0; y < num_rows; ++y, next += in_stride, to += out_stride) {
      pixels[2 * kRadius] = _mm512_load_si512(next);
      _mm512_store_si512(to, blurred<kRadius>(pixels, weight));
      for (int k = 0; k < 2 * kRadius; ++k) pixels[k] = pixels[k + 1];
    }
  }
}

// --------------------------------------------------------------------------- make_noise (loops.h)

// Four Philox calls at a time, in 64-bit lanes: multiplying their lower halves is one instruction,
// and the next multiplication ignores what is left in the upper halves.
SSLUS_AVX2 void make_noise_avx2(uint32_t seed, uint32_t y, int64_t n, float* noise) {
  const __m256i m0 = _mm256_set1_epi64x(kPhilox0), m1 = _mm256_set1_epi64x(kPhilox1);
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  const __m256i mean = _mm256_set1_epi32(510);
  const auto store = [&](__m256i words, float* to) SSLUS_AVX2 {  // noise_of
    const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(words, ones8), ones16);
    _mm256_storeu_ps(to, _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, mean)));
  };
  __m256i x = _mm256_setr_epi64x(0, 1, 2, 3);
  for (int64_t i = 0; i < n; i += 16, x = _mm256_add_epi64(x, _mm256_set1_epi64x(4))) {
    __m256i a = x, b = _mm256_set1_epi64x(y), c = _mm256_setzero_si256(), d = c;
    uint32_t k0 = seed, k1 = 0;
    for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) {
      const __m256i p = _mm256_mul_epu32(a, m0), q = _mm256_mul_epu32(c, m1);
      const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
      a = _mm256_xor_si256(_mm256_srli_epi64(q, 32), _mm256_xor_si256(b, key0));
      c = _mm256_xor_si256(_mm256_srli_epi64(p, 32), _mm256_xor_si256(d, key1));
      b = q, d = p;
    }
    const __m256i ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0b10101010);
    const __m256i cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0b10101010);
    const __m256i even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
    store(_mm256_permute2x128_si256(even, odd, 0x20), noise + i);
    store(_mm256_permute2x128_si256(even, odd, 0x31), noise + i + 8);
  }
}

// The same with eight calls.
SSLUS_AVX512 void make_noise_avx512(uint32_t seed, uint32_t y, int64_t n, float* noise) {
  constexpr int kXor = 0x96;
  const __m512i m0 = _mm512_set1_epi64(kPhilox0), m1 = _mm512_set1_epi64(kPhilox1);
  const __m512i ones8 = _mm512_set1_epi8(1), ones16 = _mm512_set1_epi16(1);
  const __m512i mean = _mm512_set1_epi32(510);
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const auto store = [&](__m512i words, float* to) SSLUS_AVX512 {  // noise_of
    const __m512i sums = _mm512_madd_epi16(_mm512_maddubs_epi16(words, ones8), ones16);
    _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, mean)));
  };
  __m512i x = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t i = 0; i < n; i += 32, x = _mm512_add_epi64(x, _mm512_set1_epi64(8))) {
    __m512i a = x, b = _mm512_set1_epi64(y), c = _mm512_setzero_si512(), d = c;
    uint32_t k0 = seed, k1 = 0;
    for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) {
      const __m512i p = _mm512_mul_epu32(a, m0), q = _mm512_mul_epu32(c, m1);
      const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
      a = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q, 32), b, key0, kXor);
      c = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p, 32), d, key1, kXor);
      b = q, d = p;
    }
    const __m512i ab = _mm512_mask_mov_epi32(a, 0xaaaa, _mm512_slli_epi64(b, 32));
    const __m512i cd = _mm512_mask_mov_epi32(c, 0xaaaa, _mm512_slli_epi64(d, 32));
    const __m512i even = _mm512_unpacklo_epi64(ab, cd), odd = _mm512_unpackhi_epi64(ab, cd);
    store(_mm512_permutex2var_epi64(even, low, odd), noise + i);
    store(_mm512_permutex2var_epi64(even, high, odd), noise + i + 16);
  }
}

// ---------------------------------------------------------------------------- normalise (loops.h)

// With non-temporal stores, which bypass the caches: these are better used for the next frames
// than for the results. `out` is aligned to 32 bytes; n is a multiple of 16.
SSLUS_AVX2 void normalise_past_caches(const int16_t* row, int64_t stride, int64_t num_rows,
                                      int64_t n, float scale, float shift, float* out) {
  const __m256 a = _mm256_set1_ps(scale), b = _mm256_set1_ps(shift);
  for (int64_t y = 0; y < num_rows; ++y, row += stride, out += n)
    for (int64_t i = 0; i < n; i += 8) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
      const __m256 z = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(x));
      _mm256_stream_ps(out + i, _mm256_fmadd_ps(z, a, b));
    }
}

SSLUS_AVX2 void normalise_past_caches(const int16_t* row, int64_t stride, int64_t num_rows,
                                      int64_t n, float scale, float shift, uint16_t* out) {
  const __m256 a = _mm256_set1_ps(scale), b = _mm256_set1_ps(shift);
  const __m256i half = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1);
  const auto rounded = [&](const int16_t* from) SSLUS_AVX2 {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256 z = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(x)), a, b);
    const __m256i bits = _mm256_castps_si256(z);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(half, odd)), 16);
  };
  for (int64_t y = 0; y < num_rows; ++y, row += stride, out += n)
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i both = _mm256_packus_epi32(rounded(row + i), rounded(row + i + 8));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_permute4x64_epi64(both, 0b11011000));
    }
}

// The same with whole cache lines: `out` is aligned to 64 bytes; a row fills cache lines.
SSLUS_AVX512 void normalise_lines(const int16_t* row, int64_t stride, int64_t num_rows, int64_t n,
                                  float scale, float shift, float* out) {
  const __m512 a = _mm512_set1_ps(scale), b = _mm512_set1_ps(shift);
  for (int64_t y = 0; y < num_rows; ++y, row += stride, out += n)
    for (int64_t i = 0; i < n; i += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
      const __m512 z = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(x));
      _mm512_stream_ps(out + i, _mm512_fmadd_ps(z, a, b));
    }
}

SSLUS_AVX512 void normalise_lines(const int16_t* row, int64_t stride, int64_t num_rows, int64_t n,
                                  float scale, float shift, uint16_t* out) {
  const __m512 a = _mm512_set1_ps(scale), b = _mm512_set1_ps(shift);
  const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  const auto rounded = [&](const int16_t* from) SSLUS_AVX512 {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512 z = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(x)), a, b);
    const __m512i bits = _mm512_castps_si512(z);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(half, odd));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
  };
  for (int64_t y = 0; y < num_rows; ++y, row += stride, out += n)
    for (int64_t i = 0; i < n; i += 32) {
      const __m512i low = _mm512_castsi256_si512(rounded(row + i));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i),
                          _mm512_inserti64x4(low, rounded(row + i + 16), 1));
    }
}
#else
[[maybe_unused]] Vectors widest() { return Vectors::kCompilers; }
#endif

// Picks the loop. `noise` has room for n numbers rounded up to a multiple of 32.
void make_noise([[maybe_unused]] Vectors vectors, uint32_t seed, uint32_t y, int64_t n,
                float* noise) {
#if defined(SSLUS_AVX2)
  if (vectors == Vectors::kAvx512) return make_noise_avx512(seed, y, n, noise);
  if (vectors == Vectors::kAvx2) return make_noise_avx2(seed, y, n, noise);
#endif
  make_noise(seed, y, n, noise);
}

// Returns the sum of the `count` pixels of each row, if it is `wanted`. A row of `rows` has `count`
// rounded up to a multiple of 32.
int64_t blend_rows([[maybe_unused]] Vectors vectors, const int16_t* rows, int64_t ring,
                   const Axis& axis, uint16_t factor, int64_t y0, int64_t y1, int64_t count,
                   bool wanted, int16_t* out, int64_t out_stride) {
  const int64_t n = round_up(count, 32);
#if defined(SSLUS_AVX2)
  constexpr decltype(&blend_rows<2>) by[] = {blend_rows<2>, blend_rows<3>, blend_rows<4>,
                                             blend_rows<5>, blend_rows<6>};
  if (vectors == Vectors::kAvx512 && axis.taps >= 2 && axis.taps <= 6)
    return by[axis.taps - 2](rows, ring, axis, factor, y0, y1, n, count, out, out_stride);
#endif
  blend_rows(rows, ring, axis, factor, y0, y1, n, out, out_stride);
  return wanted ? total(out, out_stride, y1 - y0, count, 1) : 0;
}

// Blurs rows along x (step 1) or along y (step = in_stride).
void blur([[maybe_unused]] Vectors vectors, const int16_t* in, int64_t in_stride, int64_t step,
          const Gaussian& g, int64_t num_rows, int64_t n, int16_t* out, int64_t out_stride) {
#if defined(SSLUS_AVX2)
  constexpr decltype(&blur_across<1>) by[2][6] = {
      {blur_across<1>, blur_across<2>, blur_across<3>, blur_across<4>, blur_across<5>,
       blur_across<6>},
      {blur_down<1>, blur_down<2>, blur_down<3>, blur_down<4>, blur_down<5>, blur_down<6>}};
  if (vectors == Vectors::kAvx512 && g.radius >= 1 && g.radius <= 6)
    return by[step != 1][g.radius - 1](in, in_stride, g.weights, num_rows, n, out, out_stride);
#endif
  blur(in, in_stride, step, g.weights, g.radius, num_rows, n, out, out_stride);
}

template <typename T>
void normalise([[maybe_unused]] Vectors vectors, [[maybe_unused]] bool past_caches,
               const int16_t* row, int64_t stride, int64_t num_rows, int64_t n, float scale,
               float shift, T* out) {
#if defined(SSLUS_AVX2)
  const auto address = reinterpret_cast<uintptr_t>(out);
  const size_t size = static_cast<size_t>(n) * sizeof(T);
  if (past_caches && vectors == Vectors::kAvx512 && address % 64 == 0 && size % 64 == 0)
    return normalise_lines(row, stride, num_rows, n, scale, shift, out);
  if (past_caches && vectors != Vectors::kCompilers && address % 32 == 0 && n % 16 == 0)
    return normalise_past_caches(row, stride, num_rows, n, scale, shift, out);
#endif
  normalise(row, stride, num_rows, n, scale, shift, out);
}

}  // namespace
}  // namespace sslus::augment
