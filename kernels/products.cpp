// The elementwise work of products.py between BLAS calls, in as few passes over memory as possible.
//
// For sums over the rows, each thread takes a stripe of columns, otherwise a group of rows. These
// sums are accumulated kRun rows at a time, which makes them as accurate as PyTorch's. Matrices are
// row-major, float32, or bfloat16 if they are only read; row strides may exceed row lengths.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "bits.h"
#include "clones.h"
#include "pool.h"
#include "registry.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kStripe = 256;  // columns
constexpr int64_t kRun = 16;      // rows

using Input = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Row = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstRow = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("products: ") + message);
}

// The rows of an input, read as float32.
class Rows {
 public:
  explicit Rows(const Input& z) : stride_(z.stride(0)), data_(z.data()) {
    half_ = z.dtype() == nb::dlpack::dtype{
        static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    require(half_ || z.dtype() == nb::dtype<float>(), "want float32 or bfloat16");
    require(z.shape(1) <= 1 || z.stride(1) == 1, "want rows without gaps");
  }

  // Columns j .. j + n - 1 of row i; `room` is scratch memory for widening bfloat16.
  SSLUS_INLINE const float* at(int64_t i, int64_t j, int64_t n, float* __restrict room) const {
    if (!half_) return static_cast<const float*>(data_) + i * stride_ + j;
    const uint16_t* from = static_cast<const uint16_t*>(data_) + i * stride_ + j;
    for (int64_t x = 0; x < n; ++x) room[x] = sslus::bit_cast<float>(uint32_t{from[x]} << 16);
    return room;
  }

 private:
  int64_t stride_;
  const void* data_;
  bool half_;
};

struct Out {
  explicit Out(const Matrix& m) : stride(m.stride(0)), data(m.data()) {
    require(m.shape(1) <= 1 || m.stride(1) == 1, "want rows without gaps");
  }
  float* at(int64_t i, int64_t j) const { return data + i * stride + j; }
  int64_t stride;
  float* data;
};

// Sums over the rows. add(i, run) adds row i to `run`, which is added to `sums` every kRun rows.
template <typename Add>
SSLUS_INLINE void sum_rows(int64_t rows, int64_t n, float* __restrict sums, const Add& add) {
  float run[kStripe];
  std::fill_n(sums, n, 0.0f);
  for (int64_t i0 = 0; i0 < rows; i0 += kRun) {
    std::fill_n(run, n, 0.0f);
    for (int64_t i = i0; i < std::min(i0 + kRun, rows); ++i) add(i, run);
    for (int64_t x = 0; x < n; ++x) sums[x] += run[x];
  }
}

SSLUS_CLONES void centre_stripe(const Rows& z, int64_t rows, int64_t j, int64_t n, float eps,
                                const Out& out, float* squares, float* __restrict packed) {
  float room[kStripe], first[kStripe], mean[kStripe], scale[kStripe];
  const size_t num_bytes = static_cast<size_t>(n) * sizeof(float);
  // The first row is subtracted first, which is exact for constant columns. The stripe is packed,
  // because rows with a power-of-two stride map to few cache sets.
  std::memcpy(first, z.at(0, j, n, room), num_bytes);
  sum_rows(rows, n, mean, [&](int64_t i, float* __restrict run) {
    const float* row = z.at(i, j, n, room);
    float* __restrict to = packed + i * n;
    for (int64_t x = 0; x < n; ++x) {
      to[x] = row[x] - first[x];
      run[x] += to[x];
    }
  });
  const auto count = static_cast<float>(rows);
  for (int64_t x = 0; x < n; ++x) mean[x] /= count;
  sum_rows(rows, n, squares, [&](int64_t i, float* __restrict run) {
    float* __restrict to = packed + i * n;
    for (int64_t x = 0; x < n; ++x) {
      to[x] -= mean[x];
      run[x] += to[x] * to[x];
    }
  });
  for (int64_t x = 0; x < n; ++x)
    scale[x] = eps < 0 ? 1 : 1 / std::sqrt(squares[x] / count + eps);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = packed + i * n;
    float* __restrict to = out.at(i, j);
    for (int64_t x = 0; x < n; ++x) to[x] = row[x] * scale[x];
  }
}

// Sum of weight * (a - b)^2 over a row.
SSLUS_CLONES double distance_of(const Rows& a, const Rows& b, float weight, int64_t i,
                                int64_t width) {
  float room_a[kStripe], room_b[kStripe];
  double total = 0;
  for (int64_t j = 0; j < width; j += kStripe) {
    const int64_t n = std::min(kStripe, width - j);
    const float *p = a.at(i, j, n, room_a), *q = b.at(i, j, n, room_b);
    float sums[16] = {};
    int64_t x = 0;
    for (; x + 16 <= n; x += 16)
      for (int64_t k = 0; k < 16; ++k) sums[k] += (p[x + k] - q[x + k]) * (p[x + k] - q[x + k]);
    for (; x < n; ++x) sums[0] += (p[x] - q[x]) * (p[x] - q[x]);
    for (float sum : sums) total += sum;
  }
  return total * weight;
}

SSLUS_CLONES void spread_row(const Rows& a, const Rows& b, float factor, const Out& product,
                             float alpha, const float* __restrict slope, int64_t i, int64_t width,
                             const Out& x) {
  float room_a[kStripe], room_b[kStripe];
  for (int64_t j = 0; j < width; j += kStripe) {
    const int64_t n = std::min(kStripe, width - j);
    const float *p = a.at(i, j, n, room_a), *q = b.at(i, j, n, room_b), *r = product.at(i, j);
    float* __restrict to = x.at(i, j);
    for (int64_t k = 0; k < n; ++k)
      to[k] = factor * (p[k] - q[k]) + slope[j + k] * to[k] + alpha * r[k];
  }
}

// sum_i (a_ij - b_ij)^2 for the columns of a stripe.
SSLUS_CLONES void distances_stripe(const Rows& a, const Rows& b, int64_t rows, int64_t j,
                                   int64_t n, float* sums) {
  float room_a[kStripe], room_b[kStripe];
  sum_rows(rows, n, sums, [&](int64_t i, float* __restrict run) {
    const float *p = a.at(i, j, n, room_a), *q = b.at(i, j, n, room_b);
    for (int64_t x = 0; x < n; ++x) run[x] += (p[x] - q[x]) * (p[x] - q[x]);
  });
}

// Means and variances over the rows, for the columns of a stripe: those of a and b, and the
// variance of a - b, which stays accurate where they differ little. Values are taken relative to
// the first row, whose squared distance from the mean is at most rows - 1 variances. Subtracting
// the squared mean magnifies the relative rounding error of a variance by up to that factor.
struct Moments {
  float *mean_a, *mean_b, *a, *b, *difference;
};

SSLUS_INLINE float not_below_zero(double x) {  // std::max would turn NaN into 0
  return x < 0 ? 0.0f : static_cast<float>(x);
}

SSLUS_CLONES void moments_stripe(const Rows& a, const Rows& b, int64_t rows, int64_t j, int64_t n,
                                 const Moments& to) {
  constexpr int kSums = 6;
  float room_a[kStripe], room_b[kStripe], first_a[kStripe], first_b[kStripe];
  float run[kSums][kStripe];
  double sums[kSums][kStripe] = {};
  const size_t num_bytes = static_cast<size_t>(n) * sizeof(float);
  std::memcpy(first_a, a.at(0, j, n, room_a), num_bytes);
  std::memcpy(first_b, b.at(0, j, n, room_b), num_bytes);
  for (int64_t i0 = 0; i0 < rows; i0 += kRun) {
    for (auto& row : run) std::fill_n(row, n, 0.0f);
    for (int64_t i = i0; i < std::min(i0 + kRun, rows); ++i) {
      const float *p = a.at(i, j, n, room_a), *q = b.at(i, j, n, room_b);
      for (int64_t x = 0; x < n; ++x) {
        const float u = p[x] - first_a[x], v = q[x] - first_b[x];
        const float w = (p[x] - q[x]) - (first_a[x] - first_b[x]);
        run[0][x] += u;
        run[1][x] += v;
        run[2][x] += w;
        run[3][x] += u * u;
        run[4][x] += v * v;
        run[5][x] += w * w;
      }
    }
    for (int k = 0; k < kSums; ++k)
      for (int64_t x = 0; x < n; ++x) sums[k][x] += run[k][x];
  }
  const auto count = static_cast<double>(rows);
  for (int64_t x = 0; x < n; ++x) {
    const double u = sums[0][x] / count, v = sums[1][x] / count, w = sums[2][x] / count;
    to.mean_a[j + x] = static_cast<float>(first_a[x] + u);
    to.mean_b[j + x] = static_cast<float>(first_b[x] + v);
    to.a[j + x] = not_below_zero(sums[3][x] / count - u * u);
    to.b[j + x] = not_below_zero(sums[4][x] / count - v * v);
    to.difference[j + x] = not_below_zero(sums[5][x] / count - w * w);
  }
}

// A view of Barlow Twins: x, which the gradient overwrites, and the inputs of the gradient.
struct Twin {
  Out x, product;  // product: the other view's Gram matrix times x; overwritten
  const float *left, *scale;
};

SSLUS_CLONES void cross_stripe(const Twin& a, const Twin& b, const float* __restrict w,
                               float factor, int64_t rows, int64_t j, int64_t n) {
  float mean_a[kStripe], mean_b[kStripe];
  const auto gradient = [&](const Twin& own, const Twin& other, float* mean) {
    sum_rows(rows, n, mean, [&](int64_t i, float* __restrict run) {
      const float *x = own.x.at(i, j), *y = other.x.at(i, j);
      float* __restrict g = own.product.at(i, j);
      for (int64_t k = 0; k < n; ++k) {
        g[k] = factor * g[k] + w[j + k] * y[k];
        run[k] += g[k] * x[k];
      }
    });
    const auto count = static_cast<float>(rows);
    for (int64_t k = 0; k < n; ++k) mean[k] = own.left[j + k] - mean[k] / count;
  };
  const auto finish = [&](const Twin& own, const float* mean) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* g = own.product.at(i, j);
      float* __restrict x = own.x.at(i, j);
      for (int64_t k = 0; k < n; ++k) x[k] = (g[k] + x[k] * mean[k]) * own.scale[j + k];
    }
  };
  gradient(a, b, mean_a);
  gradient(b, a, mean_b);
  finish(a, mean_a);
  finish(b, mean_b);
}

// Calls work(first, count) for the pieces of `total`, on OpenMP's threads if available: BLAS uses
// them too, and they keep spinning after a product, which would slow down other threads. The first
// exception is rethrown after the loop: one that leaves an OpenMP loop terminates the process.
template <typename Work>
void share(int64_t total, int64_t piece, int64_t threads, const Work& work) {
  const int64_t num = (total + piece - 1) / piece;
  const auto one = [&](int64_t i) { work(i * piece, std::min(piece, total - i * piece)); };
  nb::gil_scoped_release release;
#if defined(_OPENMP)
  if (threads > 1 && num > 1) {
    std::exception_ptr error;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
    for (int64_t i = 0; i < num; ++i) {
      try {
        one(i);
      } catch (...) {
#pragma omp critical(sslus_error)
        if (!error) error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#else
  if (threads > 1)
    return sslus::Pool::run(
        num, threads, [](void* p, int64_t i) { (*static_cast<decltype(one)*>(p))(i); },
        const_cast<void*>(static_cast<const void*>(&one)));
#endif
  for (int64_t i = 0; i < num; ++i) one(i);
}

bool alike(const Input& z, size_t rows, size_t width) {
  return z.shape(0) == rows && z.shape(1) == width;
}

void centre_columns(Input z, Matrix out, Row squares, double eps, int64_t threads) {
  const size_t rows = out.shape(0), width = out.shape(1);
  require(rows > 0 && alike(z, rows, width) && squares.shape(0) == width,
          "want matrices of one shape, and a number for each column");
  const Rows from(z);
  const Out to(out);
  share(static_cast<int64_t>(width), kStripe, threads, [&](int64_t j, int64_t n) {
    thread_local std::vector<float> packed;
    packed.resize(std::max<size_t>(packed.size(), rows * kStripe));
    centre_stripe(from, static_cast<int64_t>(rows), j, n, static_cast<float>(eps), to,
                  squares.data() + j, packed.data());
  });
}

const float* weights_of(const std::optional<ConstRow>& weights, size_t rows) {
  if (!weights) return nullptr;
  require(weights->shape(0) == rows, "want a weight for each row");
  return weights->data();
}

double distance(Input a, Input b, std::optional<ConstRow> weights, int64_t threads) {
  const size_t rows = a.shape(0), width = a.shape(1);
  require(alike(b, rows, width), "want matrices of one shape");
  const Rows p(a), q(b);
  const float* w = weights_of(weights, rows);
  std::vector<double> sums(rows);  // added in a fixed order, independent of the threads
  share(static_cast<int64_t>(rows), kRun, threads, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i)
      sums[static_cast<size_t>(i)] =
          distance_of(p, q, w ? w[i] : 1, i, static_cast<int64_t>(width));
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void spread_gradient(Input a, Input b, std::optional<ConstRow> weights, double factor,
                     Matrix product, double alpha, ConstRow slope, Matrix x, int64_t threads) {
  const size_t rows = x.shape(0), width = x.shape(1);
  require(alike(a, rows, width) && alike(b, rows, width) && product.shape(0) == rows &&
              product.shape(1) == width && slope.shape(0) == width,
          "want matrices of one shape, and a number for each column");
  const Rows p(a), q(b);
  const Out r(product), to(x);
  const float* w = weights_of(weights, rows);
  share(static_cast<int64_t>(rows), kRun, threads, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i)
      spread_row(p, q, static_cast<float>(w ? factor * w[i] : factor), r,
                 static_cast<float>(alpha), slope.data(), i, static_cast<int64_t>(width), to);
  });
}

void distances(Input a, Input b, Row out, int64_t threads) {
  const size_t rows = a.shape(0), width = a.shape(1);
  require(alike(b, rows, width) && out.shape(0) == width,
          "want matrices of one shape, and a number for each column");
  const Rows p(a), q(b);
  share(static_cast<int64_t>(width), kStripe, threads, [&](int64_t j, int64_t n) {
    distances_stripe(p, q, static_cast<int64_t>(rows), j, n, out.data() + j);
  });
}

void moments(Input a, Input b, Matrix out, int64_t threads) {
  const size_t rows = a.shape(0), width = a.shape(1);
  require(rows > 0 && alike(b, rows, width) && out.shape(0) == 5 && out.shape(1) == width,
          "want matrices of one shape, and five numbers for each column");
  const Rows p(a), q(b);
  const Out o(out);
  const Moments to{o.at(0, 0), o.at(1, 0), o.at(2, 0), o.at(3, 0), o.at(4, 0)};
  share(static_cast<int64_t>(width), kStripe, threads, [&](int64_t j, int64_t n) {
    moments_stripe(p, q, static_cast<int64_t>(rows), j, n, to);
  });
}

void cross_gradients(Matrix xa, Matrix xb, Matrix product_a, Matrix product_b, ConstRow w,
                     double factor, ConstRow left_a, ConstRow left_b, ConstRow scale_a,
                     ConstRow scale_b, int64_t threads) {
  const size_t rows = xa.shape(0), width = xa.shape(1);
  require(rows > 0, "want rows");
  for (const Matrix& m : {xb, product_a, product_b})
    require(m.shape(0) == rows && m.shape(1) == width, "want matrices of one shape");
  for (const ConstRow& row : {w, left_a, left_b, scale_a, scale_b})
    require(row.shape(0) == width, "want a number for each column");
  const Twin a{Out(xa), Out(product_a), left_a.data(), scale_a.data()};
  const Twin b{Out(xb), Out(product_b), left_b.data(), scale_b.data()};
  share(static_cast<int64_t>(width), kStripe, threads, [&](int64_t j, int64_t n) {
    cross_stripe(a, b, w.data(), static_cast<float>(factor), static_cast<int64_t>(rows), j, n);
  });
}

void prefer_huge_pages(nb::ndarray<nb::c_contig, nb::device::cpu> x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const auto begin = (reinterpret_cast<uintptr_t>(x.data()) + kPage - 1) & ~(kPage - 1);
  const auto end = (reinterpret_cast<uintptr_t>(x.data()) + x.nbytes()) & ~(kPage - 1);
  // It is only a hint: a kernel that has no huge pages, or has larger pages, refuses it.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)x;
#endif
}

const sslus::Binding binding([](nb::module_& m) {
  m.def("prefer_huge_pages", &prefer_huge_pages, nb::arg("x").noconvert(),
        "Asks the kernel to back x, which is not yet written, with huge pages.");
  m.def("centre_columns", &centre_columns, nb::arg("z").noconvert(), nb::arg("out").noconvert(),
        nb::arg("squares").noconvert(), nb::arg("eps"), nb::arg("threads"),
        "out = z minus its column means; squares: the sums of squares of its columns. With"
        " eps >= 0, each column is then divided by sqrt(squares / N + eps).");
  m.def("distance", &distance, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
        nb::arg("weights").noconvert().none(), nb::arg("threads"),
        "sum_ij weights_i (a_ij - b_ij)^2.");
  m.def("spread_gradient", &spread_gradient, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
        nb::arg("weights").noconvert().none(), nb::arg("factor"), nb::arg("product").noconvert(),
        nb::arg("alpha"), nb::arg("slope").noconvert(), nb::arg("x").noconvert(),
        nb::arg("threads"),
        "x_ij = factor weights_i (a_ij - b_ij) + slope_j x_ij + alpha product_ij.");
  m.def("distances", &distances, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
        nb::arg("out").noconvert(), nb::arg("threads"), "out_j = sum_i (a_ij - b_ij)^2.");
  m.def("moments", &moments, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
        nb::arg("out").noconvert(), nb::arg("threads"),
        "out (5, D): the column means of a and b; the biased column variances of a, b and a - b.");
  m.def("cross_gradients", &cross_gradients, nb::arg("xa").noconvert(), nb::arg("xb").noconvert(),
        nb::arg("product_a").noconvert(), nb::arg("product_b").noconvert(),
        nb::arg("w").noconvert(), nb::arg("factor"), nb::arg("left_a").noconvert(),
        nb::arg("left_b").noconvert(), nb::arg("scale_a").noconvert(),
        nb::arg("scale_b").noconvert(), nb::arg("threads"),
        "With g = factor product_a + w xb: xa = scale_a (g + m xa), m = left_a - mean_i g xa;"
        " xb likewise. The products are overwritten.");
});

}  // namespace
