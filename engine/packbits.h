// PackBits, the run lengths of DICOM (PS3.5 annex G.3): a byte n, then n + 1 bytes as they are, or
// one byte that is repeated 257 - n times; n = 128 does nothing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace sslus::packbits {

// Fills at most out_size bytes of out from any bytes; returns how many were written.
inline int64_t unpack(const uint8_t* packed, int64_t packed_size, uint8_t* out, int64_t out_size) {
  int64_t at = 0, done = 0;
  while (at + 1 < packed_size && done < out_size) {
    const int n = packed[at++];
    if (n == 128) continue;
    int64_t length = n < 128 ? n + 1 : 257 - n;
    length = std::min(length, out_size - done);
    if (n > 128) {
      std::memset(out + done, packed[at++], static_cast<size_t>(length));
    } else {
      length = std::min(length, packed_size - at);
      std::memcpy(out + done, packed + at, static_cast<size_t>(length));
      at += n + 1;
    }
    done += length;
  }
  return done;
}

}  // namespace sslus::packbits
