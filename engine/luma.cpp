// sslus.engine._luma: the pixel operations between the decoder and the JPEG encoder.
//
// Integer arithmetic throughout, so that every compiler, vector width and machine gives the same
// bytes, and shards can be compared by their digests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "packbits.h"

namespace nb = nanobind;

// One wheel runs everywhere: the loader picks the widest version that the processor supports.
// noinline, because GCC would inline the default version; Clang does not, and forbids to say so.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__clang__)
#define SSLUS_CLONES __attribute__((target_clones("avx2", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define SSLUS_CLONES __attribute__((noinline, target_clones("avx2", "default")))
#else
#define SSLUS_CLONES
#endif

namespace {

using Rows = nb::ndarray<const uint8_t, nb::ndim<2>, nb::device::cpu>;  // rows may be padded
using Colours = nb::ndarray<const uint8_t, nb::shape<-1, -1, 3>, nb::device::cpu>;  // any strides
using Packed = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Plane = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Image = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Starts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int kWeightBits = 14;  // weights of an output pixel sum to exactly 1 << 14
constexpr int kMiddleBits = 8;   // fraction kept between the passes: 255 << 8 fits 16 bits
constexpr int kLanes = 16;       // output rows resized together in the horizontal pass

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// 16..235 -> 0..255, rounded to nearest, clipped: round((y - 16) * 255 / 219).
// The division by 219 is the multiplication by 19152 / 2^22, exact for every y (tested).
SSLUS_CLONES void expand_row(const uint8_t* src, uint8_t* out, int64_t width) {
  for (int64_t x = 0; x < width; ++x) {
    // Every step uses the narrowest type, so that as many pixels as possible fit into a register.
    const uint8_t y = std::min<uint8_t>(std::max<uint8_t>(src[x], 16), 235);
    const auto numerator = static_cast<uint16_t>(static_cast<uint16_t>(y - 16) * 255 + 109);
    const auto high = static_cast<uint16_t>((numerator * 19152u) >> 16);
    out[x] = static_cast<uint8_t>(high >> 6);
  }
}

// BT.601, rounded; leaves grey pixels unchanged. step, colour: from a pixel to the next, and from
// red to green to blue, in bytes.
void rgb_row(const uint8_t* src, int64_t step, int64_t colour, uint8_t* out, int64_t width) {
  for (int64_t x = 0; x < width; ++x, src += step)
    out[x] = static_cast<uint8_t>(
        (299u * src[0] + 587u * src[colour] + 114u * src[2 * colour] + 500u) / 1000u);
}

// A whole row in groups. The last group overlaps the one before, so there is no scalar remainder.
void expand_whole_row(const uint8_t* src, uint8_t* out, int64_t width) {
  constexpr int64_t group = 32;
  const int64_t whole = width < group ? width : width / group * group;
  expand_row(src, out, whole);
  if (whole < width) expand_row(src + width - group, out + width - group, group);
}

// Eight pixels at a time, with compiler vector extensions: one AVX2 or two SSE registers.
typedef uint8_t Bytes __attribute__((vector_size(8)));
typedef uint16_t Words __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Longs __attribute__((vector_size(32)));

#define SSLUS_LOAD(from) __builtin_convertvector(*reinterpret_cast<const Words*>(from), Longs)

// Compilers widen bytes badly inside a longer expression, so the source is widened first.
SSLUS_CLONES void widen(const uint8_t* src, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = src[i];
}

// row[x] = sum_k weights[k] * src[k][x], with kMiddleBits of fraction.
// Processes groups of eight; the last group of a row overlaps the one before.
SSLUS_CLONES void shrink_rows(const uint16_t* src, int64_t width, const int32_t* weights,
                              int64_t taps, uint16_t* row) {
  constexpr int shift = kWeightBits - kMiddleBits;
  constexpr uint32_t half = 1u << (shift - 1);
  if (width < 8) {
    for (int64_t x = 0; x < width; ++x) {
      uint32_t sum = half;
      for (int64_t k = 0; k < taps; ++k)
        sum += static_cast<uint32_t>(weights[k]) * src[k * width + x];
      row[x] = static_cast<uint16_t>(sum >> shift);
    }
    return;
  }
  for (int64_t start = 0; start < width; start += 8) {
    const int64_t x = std::min(start, width - 8);
    Longs sum = Longs{} + half;
    for (int64_t k = 0; k < taps; ++k)
      sum += SSLUS_LOAD(src + k * width + x) * static_cast<uint32_t>(weights[k]);
    *reinterpret_cast<Words*>(row + x) = __builtin_convertvector(sum >> shift, Words);
  }
}

// columns[x][lane] = sum_k weights[x][k] * middle[starts[x] + k][lane], rounded to integers.
SSLUS_CLONES void shrink_columns(const uint16_t* middle, const int32_t* starts,
                                 const int32_t* weights, int64_t taps, int64_t width,
                                 uint16_t* columns) {
  constexpr int shift = kWeightBits + kMiddleBits;
  constexpr uint32_t half = 1u << (shift - 1);
  for (int64_t x = 0; x < width; ++x) {
    const uint16_t* first = middle + starts[x] * kLanes;
    Longs low = Longs{} + half, high = low;
    for (int64_t k = 0; k < taps; ++k) {
      const auto w = static_cast<uint32_t>(weights[x * taps + k]);
      low += SSLUS_LOAD(first + k * kLanes) * w;
      high += SSLUS_LOAD(first + k * kLanes + 8) * w;
    }
    auto* out = reinterpret_cast<Words*>(columns + x * kLanes);
    out[0] = __builtin_convertvector(low >> shift, Words);
    out[1] = __builtin_convertvector(high >> shift, Words);
  }
}

// Transposes a block of 8 x 8 in three rounds, each of which interleaves rows i and i + 4.
#if defined(__clang__) || __GNUC__ >= 12
inline void turn(const uint16_t* src, int64_t src_stride, uint16_t* out, int64_t out_stride) {
  Words a[8], b[8];
  const auto meet = [](const Words* from, Words* to) {
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = __builtin_shufflevector(from[i], from[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
  };
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Words*>(src + i * src_stride);
  meet(a, b);
  meet(b, a);
  meet(a, b);
  for (int i = 0; i < 8; ++i) *reinterpret_cast<Words*>(out + i * out_stride) = b[i];
}
#else
inline void turn(const uint16_t* src, int64_t src_stride, uint16_t* out, int64_t out_stride) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) out[j * out_stride + i] = src[i * src_stride + j];
}
#endif

// (height, width) -> (width, height). As in shrink_rows, the last group overlaps the one before.
void transpose(const uint16_t* src, int64_t height, int64_t width, uint16_t* out) {
  if (std::min(height, width) < 8) {
    for (int64_t y = 0; y < height; ++y)
      for (int64_t x = 0; x < width; ++x) out[x * height + y] = src[y * width + x];
    return;
  }
  for (int64_t row = 0; row < height; row += 8)
    for (int64_t column = 0; column < width; column += 8) {
      const int64_t y = std::min(row, height - 8), x = std::min(column, width - 8);
      turn(src + y * width + x, width, out + x * height + y, height);
    }
}

SSLUS_CLONES void narrow(const uint16_t* src, uint8_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint8_t>(src[i]);
}

SSLUS_CLONES void add_moments(const uint8_t* pixels, int64_t n, uint64_t& sum, uint64_t& squares) {
  constexpr int64_t chunk = 32768;  // 32768 * 255^2 < 2^32: the inner sums stay in 32 bits
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t stop = std::min(n, start + chunk);
    uint32_t s = 0, q = 0;
    for (int64_t i = start; i < stop; ++i) {
      const uint32_t v = pixels[i];
      s += v;
      q += v * v;
    }
    sum += s;
    squares += q;
  }
}

void check_taps(const Starts& starts, const Weights& weights, int64_t limit) {
  require(starts.shape(0) == weights.shape(0), "resize: one start for every row of weights");
  const auto taps = static_cast<int64_t>(weights.shape(1));
  for (size_t i = 0; i < starts.shape(0); ++i)
    require(starts.data()[i] >= (i ? starts.data()[i - 1] : 0) &&
                starts.data()[i] + taps <= limit,
            "resize: taps must ascend and stay inside the image");
}

void expand(Rows src, Image out) {
  require(src.shape(0) == out.shape(0) && src.shape(1) == out.shape(1),
          "expand: src and out must have the same shape");
  require(src.stride(1) == 1, "expand: the pixels of a row must be adjacent");
  nb::gil_scoped_release release;
  const auto width = static_cast<int64_t>(src.shape(1));
  for (int64_t y = 0; y < static_cast<int64_t>(src.shape(0)); ++y)
    expand_whole_row(src.data() + y * src.stride(0), out.data() + y * width, width);
}

void resize(Rows src, bool limited, Image out, int64_t top, int64_t left, Starts row_starts,
            Weights row_weights, Starts column_starts, Weights column_weights) {
  const auto height = static_cast<int64_t>(src.shape(0));
  const auto width = static_cast<int64_t>(src.shape(1));
  const auto rows = static_cast<int64_t>(row_starts.shape(0));
  const auto columns = static_cast<int64_t>(column_starts.shape(0));
  const auto row_taps = static_cast<int64_t>(row_weights.shape(1));
  const auto column_taps = static_cast<int64_t>(column_weights.shape(1));
  const auto out_width = static_cast<int64_t>(out.shape(1));
  require(src.stride(1) == 1, "resize: the pixels of a row must be adjacent");
  require(top >= 0 && left >= 0 && top + rows <= static_cast<int64_t>(out.shape(0)) &&
              left + columns <= out_width,
          "resize: the image does not fit into out");
  check_taps(row_starts, row_weights, height);
  check_taps(column_starts, column_weights, width);

  nb::gil_scoped_release release;
  std::fill(out.data(), out.data() + out.size(), uint8_t{0});
  if (rows == height && columns == width) {
    for (int64_t y = 0; y < rows; ++y) {
      const uint8_t* from = src.data() + y * src.stride(0);
      uint8_t* to = out.data() + (top + y) * out_width + left;
      if (limited)
        expand_whole_row(from, to, width);
      else
        std::memcpy(to, from, static_cast<size_t>(width));
    }
    return;
  }
  // Kept per thread between calls, to avoid an allocation per frame.
  thread_local std::vector<uint16_t> wide, rows_of_lanes, middle, shrunk;
  thread_local std::vector<uint8_t> full;
  full.resize(static_cast<size_t>(width));
  rows_of_lanes.resize(static_cast<size_t>(width * kLanes));
  middle.resize(static_cast<size_t>(width * kLanes));
  shrunk.resize(static_cast<size_t>(2 * columns * kLanes));
  uint16_t* block = shrunk.data() + columns * kLanes;
  for (int64_t y = 0; y < rows; y += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, rows - y);
    const int64_t first = row_starts.data()[y];
    const int64_t last = row_starts.data()[y + lanes - 1] + row_taps;
    wide.resize(static_cast<size_t>((last - first) * width));
    for (int64_t row = first; row < last; ++row) {
      const uint8_t* from = src.data() + row * src.stride(0);
      if (limited) {
        expand_whole_row(from, full.data(), width);
        from = full.data();
      }
      widen(from, wide.data() + (row - first) * width, width);
    }
    for (int64_t lane = 0; lane < lanes; ++lane)
      shrink_rows(wide.data() + (row_starts.data()[y + lane] - first) * width, width,
                  row_weights.data() + (y + lane) * row_taps, row_taps,
                  rows_of_lanes.data() + lane * width);
    transpose(rows_of_lanes.data(), kLanes, width, middle.data());
    shrink_columns(middle.data(), column_starts.data(), column_weights.data(), column_taps,
                   columns, shrunk.data());
    transpose(shrunk.data(), columns, kLanes, block);
    for (int64_t lane = 0; lane < lanes; ++lane)
      narrow(block + lane * columns, out.data() + (top + y + lane) * out_width + left, columns);
  }
}

nb::tuple moments(Rows image) {
  require(image.stride(1) == 1, "moments: the pixels of a row must be adjacent");
  uint64_t sum = 0, squares = 0;
  {
    nb::gil_scoped_release release;
    for (size_t y = 0; y < image.shape(0); ++y)
      add_moments(image.data() + static_cast<int64_t>(y) * image.stride(0),
                  static_cast<int64_t>(image.shape(1)), sum, squares);
  }
  return nb::make_tuple(sum, squares);
}

void luma_of_rgb(Colours src, Image out) {
  const auto height = static_cast<int64_t>(src.shape(0)), width = static_cast<int64_t>(src.shape(1));
  require(static_cast<int64_t>(out.shape(0)) == height && static_cast<int64_t>(out.shape(1)) == width,
          "rgb: src (H, W, 3) and out (H, W) differ in size");
  nb::gil_scoped_release release;
  const int64_t step = src.stride(1), colour = src.stride(2);
  for (int64_t y = 0; y < height; ++y)
    rgb_row(src.data() + y * src.stride(0), step, colour, out.data() + y * width, width);
}

int64_t unpack(Packed packed, Plane out) {
  nb::gil_scoped_release release;
  return sslus::packbits::unpack(packed.data(), static_cast<int64_t>(packed.size()), out.data(),
                                 static_cast<int64_t>(out.size()));
}

}  // namespace

// noconvert everywhere: otherwise nanobind would copy an output of the wrong dtype and lose it.
NB_MODULE(_luma, m) {
  m.doc() = "Compiled pixel work of the decoder. Call it through sslus.engine.prepare.";
  m.def("expand", &expand, nb::arg("src").noconvert(), nb::arg("out").noconvert(),
        "Limited range 16..235 in src to full range 0..255 in out, both (H, W).");
  m.def("resize", &resize, nb::arg("src").noconvert(), nb::arg("limited"),
        nb::arg("out").noconvert(), nb::arg("top"), nb::arg("left"),
        nb::arg("row_starts").noconvert(), nb::arg("row_weights").noconvert(),
        nb::arg("column_starts").noconvert(), nb::arg("column_weights").noconvert(),
        "Resize src (H, W), expanded first if its range is limited, into out at (top, left) with"
        " 14-bit weights; zero around it.");
  m.def("rgb", &luma_of_rgb, nb::arg("src").noconvert(), nb::arg("out").noconvert(),
        "BT.601 luma, rounded, of src (H, W, 3) with any strides, into out (H, W).");
  m.def("unpack", &unpack, nb::arg("packed").noconvert(), nb::arg("out").noconvert(),
        "PackBits into out, both one-dimensional. Returns how many bytes were written.");
  m.def("moments", &moments, nb::arg("image").noconvert(),
        "(sum, sum of squares) of the pixels of (H, W), exact.");
}
