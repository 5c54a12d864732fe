// sslus.engine._jpeg: see jpeg.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "jpeg.h"

namespace nb = nanobind;

namespace {

using Data = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Image = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

bool decode(Data data, Image out) {
  nb::gil_scoped_release release;
  return sslus::jpeg::decode(data.data(), data.size(), static_cast<int64_t>(out.shape(0)),
                             static_cast<int64_t>(out.shape(1)), out.data());
}

}  // namespace

NB_MODULE(_jpeg, m) {
  m.doc() = "Compiled decoding of greyscale JPEGs. Call it through sslus.engine.jpeg.";
  m.def("is_fast", &sslus::jpeg::is_fast, "Whether this processor can decode (AVX2 and BMI2).");
  m.def("decode", &decode, nb::arg("data").noconvert(), nb::arg("out").noconvert(),
        "Decode a JPEG into out (H, W). False, with undefined contents of out, if it is not a"
        " plain, complete and undamaged one of this size.");
}
