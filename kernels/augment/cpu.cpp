// sslus.kernels._cpu.views: the border between Python and views.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "augment/pool.h"
#include "augment/views.h"
#include "registry.h"

namespace nb = nanobind;
using namespace sslus::augment;

namespace {

using Frames = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Params = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("views: " + message);
}

// What memory safety needs; the ranges of all columns are checked in Python, with their names.
void check(const float* p, int64_t v, int64_t index, int64_t num_frames, int64_t store) {
  const std::string view = "view " + std::to_string(v);
  require(index >= 0 && index < num_frames, view + " wants a frame that is not there");
  const auto side = static_cast<double>(store) + kTolerance;
  for (int axis = 0; axis < 2; ++axis) {
    const double start = p[kTop + axis], length = p[kHeight + axis];
    require(start >= 0 && length >= 1 && start + length <= side, view + " wants a box outside");
  }
  for (int column : {kBrightness, kContrast, kGainNear, kGainFar})
    require(p[column] >= 0 && p[column] <= 3, view + " wants a factor that is not in 0..3");
  require(p[kSigma] >= 0 && p[kSigma] <= 16, view + " wants a sigma that is not in 0..16");
  require(p[kSolarize] >= 0 && p[kGamma] > 0 && p[kSpeckle] >= 0 && p[kSeed] >= 0 && p[kSeed] < 1e9f,
          view + " wants parameters out of range");
}

void views(Frames frames, Index index, Params params, Out out, double mean, double std,
           int64_t threads) {
  const auto num_views = static_cast<int64_t>(index.shape(0));
  const auto store = static_cast<int64_t>(frames.shape(1));
  const bool half = out.dtype() == nb::dlpack::dtype{
      static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
  require(half || out.dtype() == nb::dtype<float>(), "out must be float32 or bfloat16");
  require(frames.shape(2) == frames.shape(1), "frames must be square");
  require(params.shape(0) == index.shape(0) && params.shape(1) == kColumns,
          "params must have a row for each view and a value for each column");
  require(out.shape(0) == index.shape(0) && out.shape(1) == 1, "out must be (V, 1, h, w)");
  Job job{frames.data(), index.data(), params.data(), static_cast<char*>(out.data()), store,
          static_cast<int64_t>(out.shape(2)), static_cast<int64_t>(out.shape(3)),
          static_cast<float>(1 / (std * kWhite)), static_cast<float>(-mean / std), half,
          has_avx2(), false};
  // A batch that the caches hold until it is read goes through them.
  job.past_caches = job.avx2 && out.nbytes() > (size_t{4} << 20);

  nb::gil_scoped_release release;
  for (int64_t v = 0; v < num_views; ++v)
    check(job.params + v * kColumns, v, job.index[v], static_cast<int64_t>(frames.shape(0)), store);
  if (num_views == 0 || job.height == 0 || job.width == 0) return;
  // Within a run of views, each is written while the next is made. Long runs first, then shorter
  // ones, so that the threads end together.
  struct Context {
    const Job& job;
    int64_t num_views, share;
    int64_t after(int64_t first) const {
      return first + std::max<int64_t>(1, (num_views - first) / share);
    }
  } context{job, num_views, threads > 1 ? 2 * threads : 1};
  int64_t num_runs = 0;
  for (int64_t first = 0; first < num_views; first = context.after(first)) ++num_runs;
  sslus::Pool::run(
      num_runs, threads,
      [](void* p, int64_t run) {
        thread_local Scratch scratch;
        const auto& c = *static_cast<const Context*>(p);
        int64_t first = 0;
        for (; run > 0; --run) first = c.after(first);
        make_views(c.job, first, c.after(first), scratch);
      },
      &context);
}

// noconvert everywhere: nanobind would else copy a wrong-dtype output and lose the result.
const sslus::Binding binding([](nb::module_& m) {
  m.def("views", &views, nb::arg("frames").noconvert(), nb::arg("index").noconvert(),
        nb::arg("params").noconvert(), nb::arg("out").noconvert(), nb::arg("mean"),
        nb::arg("std"), nb::arg("threads"),
        "Views (V, 1, h, w) of frames (B, S, S), written to out. See sslus.kernels.augment.");
});

}  // namespace
