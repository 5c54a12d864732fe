// Masks on the CPU. The definition is in reference.py.
//
// A mask exists only one image row at a time, as 32 bits per pixel, all ones where hidden. It is
// made from the sample's row of the table. For patches, all image rows of a row of cells share it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "bits.h"
#include "clones.h"
#include "philox.h"
#include "pool.h"
#include "registry.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kMaxCells = 1024, kOne = 1 << 16;

// The fields of reference.Plan, in its order.
struct Plan {
  int64_t height, width, patch, rows, columns, num, ratio, share;
  int64_t low_height, high_height, low_width, high_width, sector;
};
using Numbers = std::array<int64_t, sizeof(Plan) / sizeof(int64_t)>;

// ------------------------------------------------------------------------------ vector loops

SSLUS_INLINE std::array<uint32_t, 4> words_of(uint32_t cell, uint64_t id) {
  return sslus::philox(cell, static_cast<uint32_t>(id >> 32), 0, 0, static_cast<uint32_t>(id), 0);
}

// The cell's sorting key, distinct for every cell.
SSLUS_CLONES void rank_cells(uint64_t id, int64_t num_cells, uint32_t* __restrict rank) {
  for (int64_t i = 0; i < num_cells; ++i) {
    const auto cell = static_cast<uint32_t>(i);
    rank[i] = (words_of(cell, id)[0] >> 11) * kMaxCells + cell;
  }
}

SSLUS_INLINE float widened(uint16_t bits) {
  return sslus::bit_cast<float>(uint32_t{bits} << 16);
}

// Rounds to nearest, ties to even; NaNs stay NaNs.
SSLUS_INLINE uint16_t narrowed(float x) {
  const auto word = sslus::bit_cast<uint32_t>(x);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((word & 0x7fffffff) > 0x7f800000 ? word >> 16 | 0x40 : rounded);
}

SSLUS_CLONES void widen(const uint16_t* __restrict row, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widened(row[i]);
}

SSLUS_CLONES void narrow(const float* __restrict row, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrowed(row[i]);
}

SSLUS_CLONES void count_above(const float* __restrict row, float background, int64_t n,
                              int32_t* __restrict counts) {
  for (int64_t i = 0; i < n; ++i) counts[i] += row[i] > background;
}

SSLUS_CLONES void count_above(const uint16_t* __restrict row, float background, int64_t n,
                              int32_t* __restrict counts) {
  for (int64_t i = 0; i < n; ++i) counts[i] += widened(row[i]) > background;
}

// line = cells where a rectangle covers the pixel, else 0. Bit r is set in columns[x] if rectangle
// r covers column x, and in rows if it covers this image row.
SSLUS_CLONES void both(const uint32_t* __restrict columns, uint32_t rows,
                       const uint32_t* __restrict cells, int64_t n, uint32_t* __restrict line) {
  for (int64_t i = 0; i < n; ++i) line[i] = (columns[i] & rows) ? cells[i] : 0;
}

SSLUS_CLONES int64_t ones(const uint32_t* line, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum -= static_cast<int32_t>(line[i]);
  return sum;
}

SSLUS_CLONES void blend(const uint32_t* __restrict row, const uint32_t* __restrict line,
                        uint32_t fill, int64_t n, uint32_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = line[i] ? fill : row[i];
}

SSLUS_CLONES void blend(const uint16_t* __restrict row, const uint32_t* __restrict line,
                        uint16_t fill, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto hidden = static_cast<uint16_t>(line[i]);
    out[i] = static_cast<uint16_t>((fill & hidden) | (row[i] & ~hidden));
  }
}

// gradient = w (prediction - target); returns sum w (prediction - target)^2.
SSLUS_CLONES double weigh(const float* __restrict prediction, const float* __restrict target,
                          const uint32_t* __restrict line, float hole, float rest, int64_t n,
                          float* __restrict gradient) {
  constexpr int64_t kLanes = 16;  // separate sums: one sum would be a serial chain of additions
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const float error = prediction[i + k] - target[i + k];
      const float weighted = (line[i + k] ? hole : rest) * error;
      gradient[i + k] = weighted;
      sums[k] += weighted * error;
    }
  }
  double sum = 0;
  for (; i < n; ++i) {
    const float error = prediction[i] - target[i];
    gradient[i] = (line[i] ? hole : rest) * error;
    sum += double{gradient[i]} * error;
  }
  for (const float lane : sums) sum += lane;
  return sum;
}

// ------------------------------------------------------------------------------ one sample

struct Scratch {
  std::vector<uint32_t> rank, sorted, line, cells, columns;
  std::vector<int32_t> counts, table;
  std::vector<uint8_t> lit;
  std::vector<float> rows;
};

// cells[i] = 1 if cell i belongs to the sector in the target, else 0.
template <class T>
void find_sector(const Plan& p, const T* target, float background, Scratch& s, int32_t* cells) {
  const int64_t num_cells = p.rows * p.columns;
  bool any = false;
  s.lit.assign(static_cast<size_t>(num_cells), 0);
  if (p.sector) {
    s.counts.resize(static_cast<size_t>(p.width));
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t y0 = row * p.patch, y1 = std::min(y0 + p.patch, p.height);
      std::fill(s.counts.begin(), s.counts.end(), 0);
      for (int64_t y = y0; y < y1; ++y)
        count_above(target + y * p.width, background, p.width, s.counts.data());
      for (int64_t column = 0; column < p.columns; ++column) {
        const int64_t x0 = column * p.patch, x1 = std::min(x0 + p.patch, p.width);
        const int64_t bright =
            std::accumulate(s.counts.begin() + x0, s.counts.begin() + x1, int64_t{0});
        const bool lit = bright > 0 && bright * kOne >= (y1 - y0) * (x1 - x0) * p.share;
        s.lit[static_cast<size_t>(row * p.columns + column)] = lit;
        any |= lit;
      }
    }
  }
  if (!any) {
    std::fill_n(cells, num_cells, 1);
    return;
  }
  // A cell belongs to it if it is lit, or between lit cells both in its row and in its column.
  std::vector<uint8_t>& lit = s.lit;
  const auto span = [&](int64_t first, int64_t step, int64_t n, int32_t bit) {
    int64_t low = 0, high = n - 1;
    while (low < n && !lit[static_cast<size_t>(first + low * step)]) ++low;
    while (high > low && !lit[static_cast<size_t>(first + high * step)]) --high;
    for (int64_t i = low; i <= high; ++i) cells[first + i * step] += bit;
  };
  std::fill_n(cells, num_cells, 0);
  for (int64_t row = 0; row < p.rows; ++row) span(row * p.columns, 1, p.columns, 1);
  for (int64_t column = 0; column < p.columns; ++column) span(column, p.columns, p.rows, 1);
  for (int64_t i = 0; i < num_cells; ++i) cells[i] = cells[i] == 2;
}

int64_t scaled(uint64_t word, int64_t count, int bits) {  // uniform in 0..count - 1
  return static_cast<int64_t>((word * static_cast<uint64_t>(count)) >> bits);
}

void place(const Plan& p, uint64_t id, int64_t cell, int32_t* box) {
  const auto words = words_of(static_cast<uint32_t>(cell), id);
  const int64_t height = p.low_height + scaled(words[1], p.high_height - p.low_height + 1, 32);
  const int64_t width = p.low_width + scaled(words[2], p.high_width - p.low_width + 1, 32);
  int64_t y = cell / p.columns * p.patch, x = cell % p.columns * p.patch;
  y += scaled(words[3] >> 16, std::min(p.patch, p.height - y), 16);
  x += scaled(words[3] & 0xffff, std::min(p.patch, p.width - x), 16);
  const int64_t top = std::min(std::max(y - height / 2, int64_t{0}), p.height - height);
  const int64_t left = std::min(std::max(x - width / 2, int64_t{0}), p.width - width);
  const int64_t edges[] = {top, left, top + height, left + width};
  for (int i = 0; i < 4; ++i) box[i] = static_cast<int32_t>(edges[i]);
}

// Writes a row of the table: num rectangles as (top, left, bottom, right), then for each cell 1 or
// 0: whether the patch is hidden or, with rectangles, whether the cell belongs to the sector.
template <class T>
void draw(const Plan& p, const T* target, int64_t signed_id, float background, Scratch& s,
          int32_t* table) {
  const auto id = static_cast<uint64_t>(signed_id);
  const int64_t num_cells = p.rows * p.columns;
  int32_t* cells = table + 4 * p.num;
  find_sector(p, target, background, s, cells);
  s.rank.resize(static_cast<size_t>(num_cells));
  rank_cells(id, num_cells, s.rank.data());
  s.sorted.clear();
  for (int64_t i = 0; i < num_cells; ++i)
    if (cells[i]) s.sorted.push_back(s.rank[static_cast<size_t>(i)]);
  const auto count = static_cast<int64_t>(s.sorted.size());
  if (p.num == 0) {
    const int64_t hidden = std::max((count * p.ratio + kOne / 2) / kOne, int64_t{1});
    const auto last = s.sorted.begin() + (hidden - 1);
    std::nth_element(s.sorted.begin(), last, s.sorted.end());
    for (int64_t i = 0; i < num_cells; ++i) cells[i] &= s.rank[static_cast<size_t>(i)] <= *last;
    return;
  }
  const int64_t num = std::min(p.num, count);
  std::partial_sort(s.sorted.begin(), s.sorted.begin() + num, s.sorted.end());
  for (int64_t r = 0; r < p.num; ++r)  // with too few cells, the last one is repeated
    place(p, id, s.sorted[static_cast<size_t>(std::min(r, num - 1))] % kMaxCells, table + 4 * r);
}

// Calls row(y, line) for each row of the image.
template <class F>
void each_row(const Plan& p, const int32_t* table, Scratch& s, F row) {
  const auto width = static_cast<size_t>(p.width);
  const int32_t* cells = table + 4 * p.num;
  s.cells.resize(width);
  s.line.resize(width);
  s.columns.assign(p.num ? width : 0, 0);
  for (int64_t r = 0; r < p.num; ++r)
    for (int64_t x = table[4 * r + 1]; x < table[4 * r + 3]; ++x)
      s.columns[static_cast<size_t>(x)] |= uint32_t{1} << r;
  for (int64_t y = 0; y < p.height; ++y) {
    if (y % p.patch == 0)
      for (int64_t column = 0; column < p.columns; ++column) {
        const int64_t x = column * p.patch;
        std::fill_n(s.cells.begin() + x, std::min(p.patch, p.width - x),
                    cells[y / p.patch * p.columns + column] ? ~uint32_t{0} : 0);
      }
    if (p.num == 0) {
      row(y, s.cells.data());
      continue;
    }
    uint32_t rows = 0;
    for (int64_t r = 0; r < p.num; ++r)
      rows |= uint32_t{y >= table[4 * r] && y < table[4 * r + 2]} << r;
    both(s.columns.data(), rows, s.cells.data(), p.width, s.line.data());
    row(y, s.line.data());
  }
}

void fill_row(const float* x, const uint32_t* line, float fill, int64_t n, float* out) {
  blend(reinterpret_cast<const uint32_t*>(x), line, sslus::bit_cast<uint32_t>(fill), n,
        reinterpret_cast<uint32_t*>(out));
}

void fill_row(const uint16_t* x, const uint32_t* line, float fill, int64_t n, uint16_t* out) {
  blend(x, line, narrowed(fill), n, out);
}

const float* as_floats(const float* row, int64_t, float*) { return row; }

const float* as_floats(const uint16_t* row, int64_t n, float* scratch) {
  widen(row, n, scratch);
  return scratch;
}

double weigh_row(const float* prediction, const float* target, const uint32_t* line, float hole,
                 float rest, int64_t n, float* gradient, float*) {
  return weigh(prediction, target, line, hole, rest, n, gradient);
}

double weigh_row(const float* prediction, const float* target, const uint32_t* line, float hole,
                 float rest, int64_t n, uint16_t* gradient, float* scratch) {
  const double sum = weigh(prediction, target, line, hole, rest, n, scratch);
  narrow(scratch, n, gradient);
  return sum;
}

// ---------------------------------------------------------------------------- the binding

using Images = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Losses = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument("mask: " + message);
}

Plan checked(const Numbers& numbers) {
  Plan p;
  std::memcpy(&p, numbers.data(), sizeof(p));
  require(p.patch > 0 && p.rows == (p.height + p.patch - 1) / p.patch &&
              p.columns == (p.width + p.patch - 1) / p.patch && p.rows * p.columns <= kMaxCells,
          "the cells do not fit the image");
  require(p.num >= 0 && p.num <= 32 && p.ratio >= 0 && p.ratio <= kOne, "num or ratio");
  require(p.low_height > 0 && p.low_height <= p.high_height && p.high_height <= p.height &&
              p.low_width > 0 && p.low_width <= p.high_width && p.high_width <= p.width,
          "the rectangles do not fit the image");
  return p;
}

bool is_half(const Images& x) {
  const bool half =
      x.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
  require(half || x.dtype() == nb::dtype<float>(), "images must be float32 or bfloat16");
  return half;
}

void require_images(const Images& x, size_t num, const Plan& p) {
  require(x.shape(0) == num && x.shape(1) == 1 && static_cast<int64_t>(x.shape(2)) == p.height &&
              static_cast<int64_t>(x.shape(3)) == p.width,
          "images must be (B, 1, H, W)");
}

// Calls work(sample, scratch) for each sample, on the pool.
template <class F>
void each_sample(size_t num, int64_t threads, const F& work) {
  sslus::Pool::run(
      static_cast<int64_t>(num), threads,
      [](void* context, int64_t sample) {
        thread_local Scratch scratch;
        (*static_cast<const F*>(context))(sample, scratch);
      },
      const_cast<F*>(&work));
}

// Calls f(images), as a pointer to their element type.
template <class F>
void with_type(bool half, const void* images, F f) {
  half ? f(static_cast<const uint16_t*>(images)) : f(static_cast<const float*>(images));
}

int64_t mask_table(Images target, Ids ids, Table table, const Numbers& numbers, float background,
                   int64_t threads) {
  const Plan p = checked(numbers);
  require_images(target, ids.shape(0), p);
  const bool half = is_half(target);
  const int64_t pitch = 4 * p.num + p.rows * p.columns;
  require(table.shape(0) == ids.shape(0) && static_cast<int64_t>(table.shape(1)) == pitch,
          "the table must be (B, 4 num + cells)");
  nb::gil_scoped_release release;
  std::atomic<int64_t> hidden{0};
  with_type(half, target.data(), [&](const auto* images) {
    each_sample(ids.shape(0), threads, [&](int64_t i, Scratch& s) {
      int32_t* row = table.data() + i * pitch;
      draw(p, images + i * p.height * p.width, ids.data()[i], background, s, row);
      int64_t sum = 0;
      each_row(p, row, s, [&](int64_t, const uint32_t* line) { sum += ones(line, p.width); });
      hidden += sum;
    });
  });
  return hidden;
}

void mask_fill(Images x, Images target, Ids ids, Images out, const Numbers& numbers,
               float background, float fill, int64_t threads) {
  const Plan p = checked(numbers);
  for (const Images& images : {x, target, out}) require_images(images, ids.shape(0), p);
  const bool half = is_half(x), half_target = is_half(target);
  require(is_half(out) == half, "out must have the type of x");
  nb::gil_scoped_release release;
  with_type(half_target, target.data(), [&](const auto* targets) {
    with_type(half, x.data(), [&](const auto* images) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(images)>>;
      each_sample(ids.shape(0), threads, [&](int64_t i, Scratch& s) {
        const int64_t sample = i * p.height * p.width;
        s.table.resize(static_cast<size_t>(4 * p.num + p.rows * p.columns));
        draw(p, targets + sample, ids.data()[i], background, s, s.table.data());
        const T* from = images + sample;
        T* to = static_cast<T*>(out.data()) + sample;
        each_row(p, s.table.data(), s, [&](int64_t y, const uint32_t* line) {
          fill_row(from + y * p.width, line, fill, p.width, to + y * p.width);
        });
      });
    });
  });
}

// hole, rest: the weights divided by the sum of all weights. losses: one per sample, to be summed
// in order.
void masked_mse(Images prediction, Images target, Table table, Images gradient, Losses losses,
                const Numbers& numbers, double hole, double rest, int64_t threads) {
  const Plan p = checked(numbers);
  const size_t num = losses.shape(0);
  for (const Images& images : {prediction, target, gradient}) require_images(images, num, p);
  const bool half = is_half(prediction), half_target = is_half(target);
  require(is_half(gradient) == half, "the gradient must have the type of the prediction");
  const int64_t pitch = 4 * p.num + p.rows * p.columns;
  require(table.shape(0) == num && static_cast<int64_t>(table.shape(1)) == pitch,
          "the table must be (B, 4 num + cells)");
  nb::gil_scoped_release release;
  // The gradient has twice the weights of the loss.
  const auto inside = static_cast<float>(2 * hole), outside = static_cast<float>(2 * rest);
  with_type(half_target, target.data(), [&](const auto* targets) {
    with_type(half, prediction.data(), [&](const auto* images) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(images)>>;
      each_sample(num, threads, [&](int64_t i, Scratch& s) {
        const int64_t sample = i * p.height * p.width;
        s.rows.resize(static_cast<size_t>(3 * p.width));
        float* scratch = s.rows.data();
        double sum = 0;
        each_row(p, table.data() + i * pitch, s, [&](int64_t y, const uint32_t* line) {
          const int64_t at = sample + y * p.width;
          sum += weigh_row(as_floats(images + at, p.width, scratch),
                           as_floats(targets + at, p.width, scratch + p.width), line, inside,
                           outside, p.width, static_cast<T*>(gradient.data()) + at,
                           scratch + 2 * p.width);
        });
        losses.data()[i] = sum / 2;
      });
    });
  });
}

// noconvert everywhere: otherwise nanobind would copy an output of the wrong dtype and lose it.
const sslus::Binding binding([](nb::module_& m) {
  m.def("mask_table", &mask_table, nb::arg("target").noconvert(), nb::arg("ids").noconvert(),
        nb::arg("table").noconvert(), nb::arg("numbers"), nb::arg("background"),
        nb::arg("threads"),
        "Draws each sample's mask into its row of table; returns the number of hidden pixels.");
  m.def("mask_fill", &mask_fill, nb::arg("x").noconvert(), nb::arg("target").noconvert(),
        nb::arg("ids").noconvert(), nb::arg("out").noconvert(), nb::arg("numbers"),
        nb::arg("background"), nb::arg("fill"), nb::arg("threads"),
        "x with its hidden pixels filled, into out. See sslus.kernels.mask.");
  m.def("masked_mse", &masked_mse, nb::arg("prediction").noconvert(),
        nb::arg("target").noconvert(), nb::arg("table").noconvert(),
        nb::arg("gradient").noconvert(), nb::arg("losses").noconvert(), nb::arg("numbers"),
        nb::arg("hole"), nb::arg("rest"), nb::arg("threads"),
        "Each sample's share of the loss and the gradient. See sslus.kernels.mask.");
});

}  // namespace
