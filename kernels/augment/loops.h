// Loops over rows of pixels, in 16-bit integers, vectorised along the row.
//
// Pixels are fixed-point: a grey level is kFine steps during the resize and kStep steps after it.
// A pixel is blended as `row + weight * (neighbour - row)`, rounded, so that a flat image stays
// exactly flat. A block is `num_rows` rows of n pixels, `stride` apart. Loops are multiversioned
// (clones.h) and thus never inlined, so each call processes a block instead of a row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "augment/axis.h"
#include "bits.h"
#include "clones.h"
#include "philox.h"

namespace sslus::augment {
namespace {

constexpr int kFine = 128;  // during the resize: 255 * 128 fits into 16 bits
constexpr int kStep = 64;   // after it: the sum of two pixels still fits
constexpr int kWhite = 255 * kStep;

// round(x * weight / 2^15), in a form that compilers turn into pmulhrsw or sqrdmulh.
SSLUS_INLINE int16_t scaled(int16_t x, int16_t weight) {
  return static_cast<int16_t>((((int32_t{x} * weight) >> 14) + 1) >> 1);
}

SSLUS_INLINE int16_t fine(int pixel) { return static_cast<int16_t>(pixel * kFine); }

// kFine steps -> kStep steps, times a factor in 2^-14 steps, at most white.
SSLUS_INLINE int16_t brightened(int16_t x, uint16_t factor) {
  static_assert(kFine == 2 * kStep);
  const auto twice = static_cast<uint16_t>(x << 1);
  const auto y = static_cast<uint16_t>((uint32_t{twice} * factor) >> 16);
  return static_cast<int16_t>(y < kWhite ? y : kWhite);
}

// out = row (kAdd: out) + sum of kOthers weighted differences; if kLast, times the brightness.
template <int kOthers, bool kAdd, bool kLast>
SSLUS_INLINE void blend_row(const int16_t* row, const int16_t* const* others,
                            const int16_t* weights, int64_t weight_stride, uint16_t factor,
                            int64_t n, int16_t* __restrict out) {
  const int16_t* from[kOthers + 1];
  int16_t weight[kOthers + 1];
  for (int k = 0; k < kOthers; ++k) from[k] = others[k], weight[k] = weights[k * weight_stride];
  for (int64_t i = 0; i < n; ++i) {
    int16_t sum = kAdd ? out[i] : row[i];
    for (int k = 0; k < kOthers; ++k)
      sum = static_cast<int16_t>(
          sum + scaled(static_cast<int16_t>(from[k][i] - row[i]), weight[k]));
    out[i] = kLast ? brightened(sum > 0 ? sum : int16_t{0}, factor) : sum;
  }
}

// Rows y0 .. y1 - 1 of the results: sum_k weights[k * stride + y] * row (first[y] + k), then
// brightness, in kStep steps. Row r is stored at rows + (r & ring) * n; a row after the last, which
// is any other one there, has weight 0.
SSLUS_CLONES void blend_rows(const int16_t* rows, int64_t ring, const Axis& axis, uint16_t factor,
                             int64_t y0, int64_t y1, int64_t n, int16_t* out,
                             int64_t out_stride) {
  const int64_t taps = axis.taps, stride = axis.stride;
  const int32_t* first = axis.first;
  const int16_t* others[4];
  for (int64_t y = y0; y < y1; ++y, out += out_stride) {
    const int16_t* row = rows + (first[y] & ring) * n;
    const int16_t* w = axis.weights + y;
    for (int64_t k = 1; k < taps || k == 1; k += 4) {
      const int64_t num = std::min<int64_t>(4, taps - k);
      for (int64_t j = 0; j < num; ++j)
        others[j] = rows + ((first[y] + k + j) & ring) * n;
      const int16_t* wk = w + k * stride;
      switch (num + (k > 1 ? 5 : 0) + (k + 4 < taps ? 10 : 0)) {
        case 0: blend_row<0, false, true>(row, others, wk, stride, factor, n, out); break;
        case 1: blend_row<1, false, true>(row, others, wk, stride, factor, n, out); break;
        case 2: blend_row<2, false, true>(row, others, wk, stride, factor, n, out); break;
        case 3: blend_row<3, false, true>(row, others, wk, stride, factor, n, out); break;
        case 4: blend_row<4, false, true>(row, others, wk, stride, factor, n, out); break;
        case 6: blend_row<1, true, true>(row, others, wk, stride, factor, n, out); break;
        case 7: blend_row<2, true, true>(row, others, wk, stride, factor, n, out); break;
        case 8: blend_row<3, true, true>(row, others, wk, stride, factor, n, out); break;
        case 9: blend_row<4, true, true>(row, others, wk, stride, factor, n, out); break;
        case 14: blend_row<4, false, false>(row, others, wk, stride, factor, n, out); break;
        case 19: blend_row<4, true, false>(row, others, wk, stride, factor, n, out); break;
      }
    }
  }
}

// out = in (kAdd: out) + sum over kPairs of weights[k] * (in[-k steps] + in[+k steps] - 2 in).
template <int kPairs, bool kAdd>
SSLUS_INLINE void blur_row(const int16_t* __restrict in, int64_t step, const int16_t* weights,
                           int64_t k0, int64_t n, int16_t* __restrict out) {
  int16_t weight[kPairs + 1];
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

// Blurs along the axis whose neighbours are `step` apart; weights[k] is for distance k.
SSLUS_CLONES void blur(const int16_t* in, int64_t in_stride, int64_t step, const int16_t* weights,
                       int64_t radius, int64_t num_rows, int64_t n, int16_t* out,
                       int64_t out_stride) {
  for (int64_t y = 0; y < num_rows; ++y, in += in_stride, out += out_stride) {
    switch (radius) {
      case 0: blur_row<0, false>(in, step, weights, 1, n, out); break;
      case 1: blur_row<1, false>(in, step, weights, 1, n, out); break;
      case 2: blur_row<2, false>(in, step, weights, 1, n, out); break;
      case 3: blur_row<3, false>(in, step, weights, 1, n, out); break;
      case 4: blur_row<4, false>(in, step, weights, 1, n, out); break;
      case 5: blur_row<5, false>(in, step, weights, 1, n, out); break;
      default: blur_row<6, false>(in, step, weights, 1, n, out);
    }
    int64_t k = 7;
    for (; k + 3 <= radius + 1; k += 3) blur_row<3, true>(in, step, weights, k, n, out);
    for (; k <= radius; ++k) blur_row<1, true>(in, step, weights, k, n, out);
  }
}

// The sum of a block. Multiplying by `one` lets compilers widen and add pairs in one instruction
// (pmaddwd).
SSLUS_CLONES int64_t total(const int16_t* in, int64_t stride, int64_t num_rows, int64_t n,
                           int16_t one) {
  constexpr int64_t chunk = 65536;  // chunk * white < 2^31
  int64_t sum = 0;
  for (int64_t y = 0; y < num_rows; ++y, in += stride)
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t stop = std::min(n, start + chunk);
      int32_t part = 0;
      for (int64_t i = start; i < stop; ++i) part += int32_t{in[i]} * one;
      sum += part;
    }
  return sum;
}

// min(white, max(0, factor * x + add)); factor is in units of 2^-14 and at most 3 (the table's
// bound). Unsigned 16 bits suffice: 3 * white < 2^16, and subtraction saturates at 0.
SSLUS_CLONES void stretch(int16_t* row, int64_t stride, int64_t num_rows, int64_t n,
                          uint16_t factor, int add) {
  const auto least = static_cast<uint16_t>(std::max(0, -add)), offset = static_cast<uint16_t>(add);
  for (int64_t y = 0; y < num_rows; ++y, row += stride)
    for (int64_t i = 0; i < n; ++i) {
      const auto x = static_cast<uint16_t>(row[i] << 2);
      const auto product = static_cast<uint16_t>((uint32_t{x} * factor) >> 16);
      const auto z = static_cast<uint16_t>((product > least ? product : least) + offset);
      row[i] = static_cast<int16_t>(z < kWhite ? z : kWhite);
    }
}

// white * (x / white)^gamma, as 2^(gamma log2 x): the error is below 0.03 grey levels.
SSLUS_CLONES void power(int16_t* row, int64_t stride, int64_t num_rows, int64_t n, float gamma,
                        float lowest) {
  for (int64_t y = 0; y < num_rows; ++y, row += stride)
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
      // 2^t = 2^near * 2^rest with rest in -1/2..1/2, where a short exponential series suffices.
      // `lowest`, -100, is an argument because compilers turn the constant into a branch.
      // Black has whole = -127: 2^t rounds to black again for every gamma of the table.
      const float product = gamma * log2, t = product > lowest ? product : lowest;
      const auto near = static_cast<int32_t>(t - 0.5f);
      const float r = (t - static_cast<float>(near)) * 0.69314718f;
      const float rest = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * 0.041666668f)));
      const auto scale = bit_cast<float>((near + 127) * (1 << 23));
      row[i] = static_cast<int16_t>(kWhite * (scale * rest) + 0.5f);
    }
}

SSLUS_CLONES void invert_from(int16_t* row, int64_t stride, int64_t num_rows, int64_t n,
                              int16_t threshold) {
  for (int64_t y = 0; y < num_rows; ++y, row += stride)
    for (int64_t i = 0; i < n; ++i)
      row[i] = static_cast<int16_t>(row[i] >= threshold ? kWhite - row[i] : row[i]);
}

// The sum of the word's four bytes, minus its mean.
SSLUS_INLINE float noise_of(uint32_t word) {
  const uint32_t pairs = (word & 0xff00ff) + ((word >> 8) & 0xff00ff);
  return static_cast<float>(static_cast<int32_t>((pairs & 0xffff) + (pairs >> 16)) - 510);
}

// Row y of the noise of reference.py, n pixels and up to 3 more, four per Philox4x32-10 call.
SSLUS_CLONES void make_noise(uint32_t seed, uint32_t y, int64_t n, float* __restrict noise) {
  for (int64_t x = 0; 4 * x < n; ++x) {
    const auto words = philox(static_cast<uint32_t>(x), y, 0, 0, seed, 0);
    for (int i = 0; i < 4; ++i) noise[4 * x + i] = noise_of(words[i]);
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

// The results of all rows follow one another.
SSLUS_CLONES void normalise(const int16_t* __restrict row, int64_t stride, int64_t num_rows,
                            int64_t n, float scale, float shift, float* __restrict out) {
  for (int64_t y = 0; y < num_rows; ++y, row += stride, out += n)
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(row[i]) * scale + shift;
}

// Converts to bfloat16, rounding to nearest, ties to even.
SSLUS_CLONES void normalise(const int16_t* __restrict row, int64_t stride, int64_t num_rows,
                            int64_t n, float scale, float shift, uint16_t* __restrict out) {
  for (int64_t y = 0; y < num_rows; ++y, row += stride, out += n)
    for (int64_t i = 0; i < n; ++i) {
      const auto bits = bit_cast<uint32_t>(static_cast<float>(row[i]) * scale + shift);
      out[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

}  // namespace
}  // namespace sslus::augment
