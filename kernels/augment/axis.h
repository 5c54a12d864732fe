// The filters along one axis: weights of frame pixels for the resize, and of the blur.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "clones.h"

namespace sslus::augment {
namespace {

constexpr double kTolerance = 1e-3;  // pixels, as in reference.py

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A thread's buffer, kept between calls; zero-initialised and aligned to a cache line.
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

// The resize filter along one axis: output o has weight weights[k * stride + o] for pixel
// start + first[o] + k of the frame. Weights are in units of 2^-15; the first weight of an output
// is taken as 1 minus the others.
struct Axis {
  int64_t start, span, taps, stride;
  const int32_t* first;
  const int16_t* weights;
  // The same for look_up: a group of results uses the `reach` pixels from windows[o / group] on.
  // Reach 16 or 32: groups of 8; the low byte of places[o] is 0x70 + the position of first[o].
  // Reach 64 or 128: groups of 32; places[o] is the position. kNever: a group has too many pixels.
  int64_t reach;
  const int32_t* windows;
  const int16_t* places;
};

constexpr int64_t kNever = INT64_MAX;

struct AxisBuffers {
  Buffer<int32_t> first, windows;
  Buffer<int16_t> weights, places;
  Buffer<float> share, distance, sum;
};

SSLUS_CLONES void triangle(double centre, double step, double support, int64_t offset,
                           int64_t span, int64_t taps, int64_t count, int64_t stride,
                           int32_t* __restrict first, float* __restrict distance,
                           float* __restrict sum, float* __restrict share,
                           int16_t* __restrict weights) {
  // On all processors, only 32-bit integers have vector conversions to doubles and back.
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

// Computes the windows of look_up, for groups of 8 or 32, in a row of `room` readable pixels.
// Returns the reach. first[] rises, or falls where the view is flipped.
SSLUS_CLONES int64_t make_windows(const int32_t* __restrict first, int64_t group, int64_t taps,
                                  int64_t stride, int64_t room, int32_t* __restrict windows,
                                  int16_t* __restrict places) {
  int64_t reach = 0;
  for (int64_t o = 0; o < stride; o += group) {
    reach = std::max<int64_t>(reach, std::abs(first[o + group - 1] - first[o]));
    windows[o / group] = std::min(first[o], first[o + group - 1]);
  }
  reach += taps;
  const int64_t least = group == 32 ? 64 : 16, size = reach <= least ? least : 2 * least;
  if (reach > size || room < size) return kNever;
  const int32_t zero = group == 32 ? 0 : 0x8070;
  for (int64_t o = 0; o < stride; o += group) {
    windows[o / group] = std::min(windows[o / group], static_cast<int32_t>(room - size));
    for (int64_t i = 0; i < group; ++i)
      places[o + i] = static_cast<int16_t>(zero + first[o + i] - windows[o / group]);
  }
  return size;
}

// The triangle filter of reference.py for the box start..start + length and `count` pixels.
// The span is extended to a multiple of 8 pixels, for full vectors, if the frame allows it.
// `group`: that of look_up, or 0 if it is not used.
Axis make_axis(AxisBuffers& buffers, double start, double length, int64_t store, int64_t count,
               bool reverse, int64_t group) {
  const double scale = length / static_cast<double>(count), support = std::max(scale, 1.0);
  const auto low = static_cast<int64_t>(std::floor(start + kTolerance));
  const auto high = std::min(store, static_cast<int64_t>(std::ceil(start + length - kTolerance)));
  Axis axis;
  axis.span = std::min(store, round_up(high - low, 8));
  axis.start = std::min(low, store - axis.span);
  axis.taps = std::min(static_cast<int64_t>(std::ceil(2 * support)), high - low);
  axis.stride = round_up(count, 32);
  auto* first = buffers.first.at_least(axis.stride);
  auto* weights = buffers.weights.at_least(axis.taps * axis.stride);
  auto* windows = buffers.windows.at_least(axis.stride / 8);
  auto* places = buffers.places.at_least(axis.stride);
  const double centre = start - static_cast<double>(low) + scale / 2;
  const double step = reverse ? -scale : scale;
  triangle(reverse ? centre + scale * static_cast<double>(count - 1) : centre, step, support,
           low - axis.start, high - low, axis.taps, count, axis.stride, first,
           buffers.distance.at_least(count), buffers.sum.at_least(count),
           buffers.share.at_least(axis.taps * axis.stride), weights);
  for (int64_t o = count; o < axis.stride; ++o) first[o] = first[count - 1];
  axis.reach = kNever;
  for (; group >= 8 && axis.reach == kNever; group = group == 32 ? 8 : 0)
    axis.reach = make_windows(first, group, axis.taps, axis.stride, store - axis.start, windows,
                              places);
  axis.first = first;
  axis.weights = weights;
  axis.windows = windows;
  axis.places = places;
  return axis;
}

struct Gaussian {
  int64_t radius = 0;
  int16_t weights[64];  // weights[k] is for distance k; radius <= 48, as sigma <= 16
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

}  // namespace
}  // namespace sslus::augment
