// Views of stored frames on the CPU. The definition is in reference.py.
//
// Crop, resize and blur are separable: a pass along each axis, a few rows at a time.
//
//   Resample  frame --resize_across--> rows in a ring --blend_rows, brightness--> plane
//   Finish    plane --contrast, gamma--> rows --blur along x--> rows --blur along y--> rows
//             rows --solarize, gain, speckle--> rows --normalise--> out
//
// The two are separated because contrast needs the mean of the whole view. The plane, with 16 bits
// per pixel, is stored as a whole image (98 KiB at 224 x 224, which fits in the L2 cache), as are
// the rows between the blurs; everything else is a few rows in the L1 cache.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "augment/across.h"
#include "augment/axis.h"
#include "augment/loops.h"

namespace sslus::augment {
namespace {

// The columns of the table in reference.py.
enum Column {
  kTop, kLeft, kHeight, kWidth, kFlip, kBrightness, kContrast, kGamma, kSigma,
  kSolarize, kGainNear, kGainFar, kSpeckle, kSeed, kColumns
};

// Rows processed together: few, so that the store buffer can drain in between.
constexpr int64_t kRows = 4;

struct Scratch {
  AxisBuffers rows, columns;
  Buffer<int16_t> turned, ring, plane[2], image, blurred;
  Buffer<float> noise;
};

struct Job {
  const uint8_t* frames;
  const int64_t* index;
  const int64_t* order;  // in which the views are made
  const float* params;
  char* out;
  int64_t store, height, width;
  float scale, shift;  // result = step * scale + shift
  bool half;           // bfloat16, else float32
  Vectors vectors;     // at most those of the processor
  bool past_caches;    // non-temporal stores, where there are any
};

// A view in progress: the weights of its blur, and its pixels between the two halves.
struct View {
  int64_t v;
  const float* params;
  Gaussian across, down;
  int16_t* plane;
  int64_t plane_stride;
};

void begin(const Job& job, int64_t v, int64_t parity, Scratch& scratch, View& view) {
  const float* p = job.params + v * kColumns;
  view.v = v, view.params = p;
  view.across = gaussian(p[kSigma], job.width);
  view.down = job.height == job.width ? view.across : gaussian(p[kSigma], job.height);
  const int64_t margin = round_up(view.across.radius, 32);  // for mirrored pixels
  view.plane_stride = round_up(job.width, 32) + 2 * margin;
  view.plane = scratch.plane[parity].at_least(job.height * view.plane_stride) + margin;
}

// The first half: crop, resize, flip and brightness.
class Resample {
 public:
  Resample(const Job& job, const View& view, Scratch& scratch) : job_(job), view_(view) {
    const float* p = view.params;
    down_ = make_axis(scratch.rows, p[kTop], p[kHeight], job.store, job.height, false, 0);
    across_ = make_axis(scratch.columns, p[kLeft], p[kWidth], job.store, job.width, p[kFlip] > 0,
                        group_of(job.vectors));
    batch_ = across_.reach == kNever ? kLanes : kRows;
    // A row of results needs `taps` rows, which are computed a batch at a time.
    ring_ = batch_;
    while (ring_ < down_.taps + batch_) ring_ *= 2;
    rows_ = scratch.ring.at_least(ring_ * across_.stride);
    turned_ = scratch.turned.at_least((across_.span + across_.taps + across_.stride) * kLanes);
    image_ = job.frames + (job.index[view.v] * job.store + down_.start) * job.store + across_.start;
    factor_ = static_cast<uint16_t>(std::lround(p[kBrightness] * 16384));
  }

  // Computes all rows above y1, and possibly some more.
  void until(int64_t y1) {
    for (; y_ < y1; ready_ += batch_) {
      resize_across(image_ + ready_ * job_.store, job_.store,
                    std::min(batch_, down_.span - ready_), across_, job_.width, turned_,
                    rows_ + (ready_ & (ring_ - 1)) * across_.stride);
      int64_t end = y_;
      while (end < job_.height &&
             std::min(down_.first[end] + down_.taps, down_.span) <= ready_ + batch_)
        ++end;
      int16_t* out = view_.plane + y_ * view_.plane_stride;
      sum_ += blend_rows(job_.vectors, rows_, ring_ - 1, down_, factor_, y_, end, job_.width,
                         view_.params[kContrast] != 1, out, view_.plane_stride);
      y_ = end;
    }
  }

  // The mean of all pixels, once all rows exist; only if contrast needs it.
  double mean() const {
    return static_cast<double>(sum_) / static_cast<double>(job_.height * job_.width);
  }

 private:
  const Job& job_;
  const View& view_;
  Axis down_, across_;
  int64_t batch_, ring_;
  int16_t *rows_, *turned_;
  const uint8_t* image_;
  uint16_t factor_;
  int64_t y_ = 0, ready_ = 0, sum_ = 0;  // rows of the view, rows of the frame
};

// The last steps for rows y.. of a view, in-place: solarize, gain, speckle, normalisation.
void finish(const Job& job, int64_t v, int64_t y, int64_t num_rows, int16_t* rows, int64_t stride,
            Scratch& scratch) {
  const float* p = job.params + v * kColumns;
  const int64_t width = job.width;
  if (p[kSolarize] <= 1)
    invert_from(rows, stride, num_rows, width,
                static_cast<int16_t>(std::ceil(p[kSolarize] * kWhite)));
  const bool ramp = p[kGainNear] != 1 || p[kGainFar] != 1;
  for (int64_t i = 0; i < num_rows && (ramp || p[kSpeckle] > 0); ++i) {
    int16_t* row = rows + i * stride;
    if (ramp) {
      const double depth = (static_cast<double>(y + i) + 0.5) / static_cast<double>(job.height);
      const double gain = p[kGainNear] + (p[kGainFar] - p[kGainNear]) * depth;
      stretch(row, stride, 1, width, static_cast<uint16_t>(std::lround(gain * 16384)), 0);
    }
    if (p[kSpeckle] > 0) {
      constexpr float deviation = 147.80054f;  // sqrt(21845): of the sum of four bytes
      float* noise = scratch.noise.at_least(round_up(width, 32));
      make_noise(job.vectors, static_cast<uint32_t>(p[kSeed]), static_cast<uint32_t>(y + i), width,
                 noise);
      speckle(row, noise, p[kSpeckle] / deviation, kWhite, width);
    }
  }
  const auto write = [&](auto* out) {
    normalise(job.vectors, job.past_caches, rows, stride, num_rows, width, job.scale, job.shift,
              out + (v * job.height + y) * width);
  };
  if (job.half)
    write(reinterpret_cast<uint16_t*>(job.out));
  else
    write(reinterpret_cast<float*>(job.out));
}

// Fills the margins on both sides of each row with mirrored pixels.
void mirror_columns(int16_t* rows, int64_t stride, int64_t num_rows, int64_t width,
                    int64_t radius) {
  for (int64_t y = 0; y < num_rows; ++y, rows += stride) {
    int16_t* last = rows + width - 1;
    for (int64_t k = 1; k <= radius; ++k) rows[-k] = rows[k], last[k] = last[-k];
  }
}

// Mirrors rows at row `edge`: fills those before it (side = -1) or after it (side = 1).
void mirror_rows(int16_t* edge, int64_t stride, int64_t radius, int side) {
  for (int64_t k = 1; k <= radius; ++k)
    std::memcpy(edge + side * k * stride, edge - side * k * stride,
                static_cast<size_t>(stride) * 2);
}

// The second half: contrast and the following steps. Rows blurred along y lag behind by the blur's
// radius.
class Finish {
 public:
  Finish() = default;  // nothing to do

  Finish(const Job& job, const View& view, Scratch& scratch, double mean)
      : job_(&job), view_(&view), scratch_(&scratch), stride_(round_up(job.width, 32)) {
    factor_ = static_cast<uint16_t>(std::lround(view.params[kContrast] * 16384));
    add_ = static_cast<int>(std::lround((1 - view.params[kContrast]) * mean));
    if (view.across.radius > 0 || view.down.radius > 0)
      image_ = scratch.image.at_least((job.height + 2 * view.down.radius) * stride_) +
               view.down.radius * stride_;
  }

  void until(int64_t y1) {
    while (job_ != nullptr && y_ < y1) step(std::min(y_ + kRows, y1));
  }

 private:
  void step(int64_t y1) {
    const int64_t num_rows = y1 - y_, stride = view_->plane_stride;
    const float *p = view_->params, gamma = p[kGamma];
    int16_t* rows = view_->plane + y_ * stride;
    if (p[kContrast] != 1) stretch(rows, stride, num_rows, stride_, factor_, add_);
    if (gamma != 1) power(rows, stride, num_rows, stride_, gamma, -100);
    if (image_ == nullptr)
      finish(*job_, view_->v, y_, num_rows, rows, stride, *scratch_);
    else
      blur_rows(rows, y1);
    y_ = y1;
  }

  void blur_rows(int16_t* rows, int64_t y1) {
    const Gaussian &across = view_->across, &down = view_->down;
    const int64_t height = job_->height, stride = view_->plane_stride;
    mirror_columns(rows, stride, y1 - y_, job_->width, across.radius);
    blur(job_->vectors, rows, stride, 1, across, y1 - y_, stride_, image_ + y_ * stride_, stride_);
    const int64_t ready = y1 == height ? height : y1 - down.radius;
    if (ready <= done_) return;
    if (done_ == 0) mirror_rows(image_, stride_, down.radius, -1);
    if (ready == height) mirror_rows(image_ + (height - 1) * stride_, stride_, down.radius, 1);
    int16_t* blurred = scratch_->blurred.at_least((ready - done_) * stride_);
    blur(job_->vectors, image_ + done_ * stride_, stride_, stride_, down, ready - done_, stride_,
         blurred, stride_);
    finish(*job_, view_->v, done_, ready - done_, blurred, stride_, *scratch_);
    done_ = ready;
  }

  const Job* job_ = nullptr;
  const View* view_ = nullptr;
  Scratch* scratch_ = nullptr;
  int64_t stride_ = 0;
  int16_t* image_ = nullptr;
  uint16_t factor_ = 0;
  int add_ = 0;
  int64_t y_ = 0, done_ = 0;
};

// Makes views order[i0] .. order[i1 - 1]. The first half of each is interleaved with the second
// half of the previous one, so that writing one view to memory overlaps with computing the next.
void make_views(const Job& job, int64_t i0, int64_t i1, Scratch& scratch) {
  Finish before;
  View two[2];  // the one that is resampled and the one before it
  for (int64_t i = i0; i < i1; ++i) {
    View& view = two[i & 1];
    begin(job, job.order[i], i & 1, scratch, view);
    Resample now(job, view, scratch);
    for (int64_t y = 0; y < job.height;) {
      y = std::min(y + kRows, job.height);
      now.until(y);
      before.until(y);
    }
    before = Finish(job, view, scratch, now.mean());
  }
  before.until(job.height);
}

}  // namespace
}  // namespace sslus::augment
