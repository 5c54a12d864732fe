// sslus.engine._jpeg: see jpeg.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <deque>

#include "jpeg.h"

namespace nb = nanobind;

namespace {

using Images = nb::ndarray<uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// The content of a bytes-like object, which cannot go away while this holds it.
class Content {
 public:
  explicit Content(nb::handle from) {
    if (PyObject_GetBuffer(from.ptr(), &buffer_, PyBUF_SIMPLE)) throw nb::python_error();
  }
  ~Content() { PyBuffer_Release(&buffer_); }
  Content(const Content&) = delete;

  const uint8_t* data() const { return static_cast<const uint8_t*>(buffer_.buf); }
  size_t size() const { return static_cast<size_t>(buffer_.len); }

 private:
  Py_buffer buffer_;
};

nb::list decode(nb::sequence jpegs, Images out) {
  std::deque<Content> contents;  // which, unlike a vector, never moves them
  for (nb::handle jpeg : jpegs) contents.emplace_back(jpeg);
  if (contents.size() != out.shape(0)) throw nb::value_error("want as many files as images");
  const auto height = static_cast<int64_t>(out.shape(1)), width = static_cast<int64_t>(out.shape(2));
  std::vector<size_t> left;
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < contents.size(); ++i)
      if (!sslus::jpeg::decode(contents[i].data(), contents[i].size(), height, width,
                               out.data() + static_cast<int64_t>(i) * height * width))
        left.push_back(i);
  }
  nb::list numbers;
  for (size_t i : left) numbers.append(i);
  return numbers;
}

}  // namespace

NB_MODULE(_jpeg, m) {
  m.doc() = "Compiled decoding of greyscale JPEGs. Call it through sslus.engine.jpeg.";
  m.def("is_fast", &sslus::jpeg::is_fast, "Whether this processor can decode (AVX2 and BMI2).");
  m.def("decode", &decode, nb::arg("jpegs"), nb::arg("out").noconvert(),
        "Decode JPEGs, bytes-like objects, into out (B, H, W). Returns the numbers of those that"
        " are not plain, complete and undamaged ones of this size; their images are undefined.");
}
