// The table of random views, one row per view: ssl/views.py says what is drawn.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "augment/views.h"
#include "philox.h"

namespace sslus::augment {
namespace {

// The fields of ViewConfig in ssl/views.py, in their order.
struct Ranges {
  double min_area, max_area, max_aspect, p_flip, p_jitter, brightness, contrast, gamma, p_blur,
      max_sigma, p_solarize, solarize, p_gain, gain, p_speckle, speckle;
};

// Draws one row; its random numbers depend only on (seed, epoch, frame, view). Each number has one
// fixed use, so that changing one field changes no other column.
inline void draw(const Ranges& r, uint32_t frame, uint32_t view, uint32_t epoch, uint64_t seed,
                 double store, double size, float* row) {
  constexpr int kBlocks = 5;  // of four words: 18 are used
  uint32_t words[4 * kBlocks];
  for (uint32_t block = 0; block < kBlocks; ++block) {
    const auto four = philox(frame, view, epoch, block, static_cast<uint32_t>(seed),
                             static_cast<uint32_t>(seed >> 32));
    for (int i = 0; i < 4; ++i) words[4 * block + i] = four[i] >> 8;
  }
  // 24 bits fit into the significand of a float32: uniform in [0, 1), never rounded up to 1.
  const uint32_t* next = words;
  const auto uniform = [&] { return *next++ * 0x1p-24; };
  const auto either = [&](double p) { return uniform() < p; };
  const auto symmetric = [&](double reach) { return reach * (2 * uniform() - 1); };
  const auto side = [&](double length) {
    return std::min(std::max(std::nearbyint(length * store), 1.0), store);
  };
  const auto set = [&](Column column, double value) { row[column] = static_cast<float>(value); };

  const double area = r.min_area + (r.max_area - r.min_area) * uniform();
  // A wider or taller crop of this area would not fit into the frame.
  const double reach = std::min(std::log(r.max_aspect), -std::log(area));
  const double aspect = std::exp(symmetric(reach));
  const double height = side(std::sqrt(area / aspect)), width = side(std::sqrt(area * aspect));
  set(kHeight, height);
  set(kWidth, width);
  set(kTop, std::floor(uniform() * (store - height + 1)));
  set(kLeft, std::floor(uniform() * (store - width + 1)));
  set(kFlip, either(r.p_flip));
  const bool jitter = either(r.p_jitter);
  const double brightness = 1 + symmetric(r.brightness), contrast = 1 + symmetric(r.contrast);
  const double gamma = std::exp(symmetric(r.gamma));
  set(kBrightness, jitter ? brightness : 1);
  set(kContrast, jitter ? contrast : 1);
  set(kGamma, jitter ? gamma : 1);
  const double sigma = r.max_sigma * size * (0.05 + 0.95 * uniform());
  set(kSigma, either(r.p_blur) ? sigma : 0);
  set(kSolarize, either(r.p_solarize) ? r.solarize : 2);
  const bool ramp = either(r.p_gain);
  const double near = 1 + symmetric(r.gain), far = 1 + symmetric(r.gain);
  set(kGainNear, ramp ? near : 1);
  set(kGainFar, ramp ? far : 1);
  const bool speckled = either(r.p_speckle);
  const double speckle = r.speckle * uniform();
  set(kSpeckle, speckled ? speckle : 0);
  set(kSeed, words[4 * kBlocks - 1]);  // a word that nothing else uses
}

}  // namespace
}  // namespace sslus::augment
