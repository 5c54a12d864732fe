// Resizes rows of a frame along x, from bytes to units of 1 / kFine grey level.
//
// Every result needs pixels at its own positions, so a vector of results must gather them. avx.h
// uses byte shuffles as a look-up table: 8 results from a window of 16 or 32 pixels, or 32 results
// from 64 or 128. On other processors, or if the results need more pixels, 16 rows are transposed,
// so that a column of theirs is a vector and gathering becomes a load from another address. The
// results are the same.
#pragma once
#include "augment/avx.h"

namespace sslus::augment {
namespace {

constexpr int64_t kLanes = 16;  // rows transposed together

#if defined(__has_builtin) && !defined(SSLUS_OLD_COMPILER)
#if __has_builtin(__builtin_shufflevector) && __has_builtin(__builtin_convertvector)
#define SSLUS_SHUFFLES
#endif
#endif

SSLUS_INLINE void to_column(const uint8_t* const* rows, int64_t x, int16_t* columns) {
  for (int64_t y = 0; y < kLanes; ++y) columns[x * kLanes + y] = fine(rows[y][x]);
}

#if defined(SSLUS_SHUFFLES)
// Vectors of 8 and 16 pixels (compiler vector extensions), at any address.
typedef uint8_t EightBytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef int16_t Eight __attribute__((vector_size(16), aligned(2), may_alias));
typedef int16_t Sixteen __attribute__((vector_size(32), aligned(2), may_alias));

// Three rounds of this transpose an 8 x 8 block; in Sixteen, two such blocks side by side.
#define SSLUS_INTERLEAVE(from, to, low, high)                             \
  for (int i = 0; i < 4; ++i) {                                           \
    to[2 * i] = __builtin_shufflevector(from[i], from[i + 4], low);       \
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 4], high);  \
  }
#define SSLUS_LOW 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27
#define SSLUS_HIGH 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31
#define SSLUS_JOIN 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15

SSLUS_INLINE Eight eight(const uint8_t* pixels) {
  return __builtin_convertvector(*reinterpret_cast<const EightBytes*>(pixels), Eight) * kFine;
}

// kLanes rows -> n columns of kLanes pixels, in units of 1 / kFine grey level.
SSLUS_CLONES void to_columns(const uint8_t* const* rows, int64_t n, int16_t* columns) {
  int64_t x = 0;
  for (; x + 8 <= n; x += 8) {
    Sixteen a[8], b[8];
    for (int i = 0; i < 8; ++i)
      a[i] = __builtin_shufflevector(eight(rows[i] + x), eight(rows[i + 8] + x), SSLUS_JOIN);
    SSLUS_INTERLEAVE(a, b, SSLUS_LOW, SSLUS_HIGH)
    SSLUS_INTERLEAVE(b, a, SSLUS_LOW, SSLUS_HIGH)
    SSLUS_INTERLEAVE(a, b, SSLUS_LOW, SSLUS_HIGH)
    for (int i = 0; i < 8; ++i)
      *reinterpret_cast<Sixteen*>(columns + (x + i) * kLanes) = b[i];
  }
  for (; x < n; ++x) to_column(rows, x, columns);
}

// The inverse; n is a multiple of 8.
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

#else  // for older compilers without these vectors: a quarter of the speed
void to_columns(const uint8_t* const* rows, int64_t n, int16_t* columns) {
  for (int64_t x = 0; x < n; ++x) to_column(rows, x, columns);
}

void to_rows(const int16_t* columns, int64_t n, int16_t* rows, int64_t stride) {
  for (int64_t y = 0; y < kLanes; ++y)
    for (int64_t x = 0; x < n; ++x) rows[y * stride + x] = columns[x * kLanes + y];
}
#endif

// For each column, kLanes rows: out = from (kAdd: out) + sum of kOthers weighted differences.
template <int kOthers, bool kAdd, bool kLast>
SSLUS_INLINE void blend_columns_of(const int16_t* __restrict in, const int32_t* __restrict first,
                                   const int16_t* __restrict weights, int64_t stride, int64_t k0,
                                   int64_t n, int16_t* __restrict out) {
  for (int64_t x = 0; x < n; ++x) {
    const int16_t* from = in + first[x] * kLanes;
    const int16_t* to = from + k0 * kLanes;
    const int16_t* weight = weights + k0 * stride + x;
    for (int64_t i = 0; i < kLanes; ++i) {
      int16_t sum = kAdd ? out[x * kLanes + i] : from[i];
      for (int k = 0; k < kOthers; ++k)
        sum = static_cast<int16_t>(sum + scaled(static_cast<int16_t>(to[k * kLanes + i] - from[i]),
                                                weight[k * stride]));
      out[x * kLanes + i] = kLast && sum < 0 ? int16_t{0} : sum;
    }
  }
}

SSLUS_CLONES void blend_columns(const int16_t* in, const int32_t* first, const int16_t* w,
                                int64_t stride, int64_t taps, int64_t n, int16_t* out) {
  switch (taps) {
    case 1: return blend_columns_of<0, false, true>(in, first, w, stride, 1, n, out);
    case 2: return blend_columns_of<1, false, true>(in, first, w, stride, 1, n, out);
    case 3: return blend_columns_of<2, false, true>(in, first, w, stride, 1, n, out);
    case 4: return blend_columns_of<3, false, true>(in, first, w, stride, 1, n, out);
    case 5: return blend_columns_of<4, false, true>(in, first, w, stride, 1, n, out);
  }
  blend_columns_of<4, false, false>(in, first, w, stride, 1, n, out);
  int64_t k = 5;
  for (; k + 4 < taps; k += 4) blend_columns_of<4, true, false>(in, first, w, stride, k, n, out);
  for (; k + 1 < taps; ++k) blend_columns_of<1, true, false>(in, first, w, stride, k, n, out);
  blend_columns_of<1, true, true>(in, first, w, stride, k, n, out);
}

// num_rows <= kLanes rows, `row_stride` apart -> contiguous rows of axis.stride results.
// `columns`: room for kLanes * (axis.span + axis.taps + axis.stride) numbers.
void resize_across(const uint8_t* rows, int64_t row_stride, int64_t num_rows, const Axis& axis,
                   int64_t count, int16_t* columns, int16_t* out) {
#if defined(SSLUS_AVX2)
  if (look_up(rows, row_stride, num_rows, axis, out)) return;
#endif
  const uint8_t* row[kLanes];
  for (int64_t y = 0; y < kLanes; ++y) row[y] = rows + std::min(y, num_rows - 1) * row_stride;
  int16_t* blended = columns + (axis.span + axis.taps) * kLanes;
  to_columns(row, axis.span, columns);
  blend_columns(columns, axis.first, axis.weights, axis.stride, axis.taps, count, blended);
  to_rows(blended, axis.stride, out, axis.stride);
}

}  // namespace
}  // namespace sslus::augment
