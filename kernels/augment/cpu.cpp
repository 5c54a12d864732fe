// sslus.kernels._cpu.views: the binding between Python and views.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "augment/draw.h"
#include "pool.h"
#include "augment/views.h"
#include "registry.h"

namespace nb = nanobind;
using namespace sslus::augment;

namespace {

using Frames = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Index = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Params = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("views: ") + message);
}

// The bounds of reference.py, for each column of the table.
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest[kColumns] = {0, 0, 1, 1, 0, 0, 0, 0.2f, 0, 0, 0, 0, 0, 0};
constexpr float kHighest[kColumns] = {kInf, kInf, kInf, kInf, 1, 3, 3, 5, 16, 2, 3, 3, 1, 16777215};

bool right(const float* p, int64_t index, int64_t num_frames, int64_t store) {
  const auto side = static_cast<double>(store) + kTolerance;
  bool ok = index >= 0 && index < num_frames;
  for (int c = 0; c < kColumns; ++c) ok &= p[c] >= kLowest[c] && p[c] <= kHighest[c];  // no NaN
  for (int axis = 0; axis < 2; ++axis)
    ok &= static_cast<double>(p[kTop + axis]) + static_cast<double>(p[kHeight + axis]) <= side;
  return ok && p[kFlip] == std::rint(p[kFlip]) && p[kSeed] == std::rint(p[kSeed]);
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
  Job job{frames.data(), index.data(), nullptr, params.data(), static_cast<char*>(out.data()),
          store, static_cast<int64_t>(out.shape(2)), static_cast<int64_t>(out.shape(3)),
          static_cast<float>(1 / (std * kWhite)), static_cast<float>(-mean / std), half,
          widest(), false};
  // Only batches too large to stay in the caches until they are read bypass them.
  job.past_caches = out.nbytes() > (size_t{4} << 20);

  nb::gil_scoped_release release;
  for (int64_t v = 0; v < num_views; ++v)
    if (!right(job.params + v * kColumns, job.index[v], static_cast<int64_t>(frames.shape(0)),
               store))
      throw std::invalid_argument("views: out of range: view " + std::to_string(v));
  if (num_views == 0 || job.height == 0 || job.width == 0) return;
  // The views of a frame follow one another: all but the first find it in the caches.
  thread_local std::vector<int64_t> order;  // kept between calls
  order.resize(static_cast<size_t>(num_views));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return job.index[a] != job.index[b] ? job.index[a] < job.index[b] : a < b;
  });
  job.order = order.data();
  // Within a run of views, writing one overlaps with computing the next. Long runs first, then
  // shorter ones, so that all threads finish at about the same time.
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

using Words32 = nb::ndarray<uint32_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;
using Fields = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void draw_table(Fields ranges, Index frames, Index epochs, uint32_t view, uint64_t seed,
                double store, double size, Table out) {
  constexpr size_t num_ranges = sizeof(Ranges) / sizeof(double);
  require(ranges.shape(0) == num_ranges, "wrong number of ranges to draw from");
  require(epochs.shape(0) == frames.shape(0) && out.shape(0) == frames.shape(0) &&
              out.shape(1) == kColumns, "the table needs a row for each frame and epoch");
  Ranges r;
  std::memcpy(&r, ranges.data(), sizeof r);
  nb::gil_scoped_release release;
  for (size_t i = 0; i < frames.shape(0); ++i)
    draw(r, static_cast<uint32_t>(frames.data()[i]), view,
         static_cast<uint32_t>(epochs.data()[i]), seed, store, size, out.data() + i * kColumns);
}

void philox_words(Words32 words, uint64_t key) {
  for (size_t i = 0; i < words.shape(0); ++i) {
    uint32_t* w = words.data() + 4 * i;
    const auto four = sslus::philox(w[0], w[1], w[2], w[3], static_cast<uint32_t>(key),
                                    static_cast<uint32_t>(key >> 32));
    std::copy_n(four.begin(), 4, w);
  }
}

// noconvert everywhere: otherwise nanobind would copy an output of the wrong dtype and lose it.
const sslus::Binding binding([](nb::module_& m) {
  m.def("views", &views, nb::arg("frames").noconvert(), nb::arg("index").noconvert(),
        nb::arg("params").noconvert(), nb::arg("out").noconvert(), nb::arg("mean"),
        nb::arg("std"), nb::arg("threads"),
        "Views (V, 1, h, w) of frames (B, S, S), written to out. See sslus.kernels.augment.");
  m.def("draw_views", &draw_table, nb::arg("ranges").noconvert(), nb::arg("frames").noconvert(),
        nb::arg("epochs").noconvert(), nb::arg("view"), nb::arg("seed"), nb::arg("store"),
        nb::arg("size"), nb::arg("out").noconvert(),
        "The table of random views (V, P), written to out. See sslus.ssl.views.draw.");
  m.def("philox", &philox_words, nb::arg("words").noconvert(), nb::arg("key"),
        "Philox4x32-10 of counters (N, 4), which are overwritten by the random words.");
});

}  // namespace
