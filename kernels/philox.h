// Counter-based random numbers: Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3". Any word can be computed without those before it; equal on every machine.
#pragma once
#include <array>
#include <cstdint>

#include "clones.h"

namespace sslus {

constexpr uint32_t kPhilox0 = 0xD2511F53, kPhilox1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9, kPhiloxKey1 = 0xBB67AE85;

SSLUS_INLINE std::array<uint32_t, 4> philox(uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                            uint32_t k0, uint32_t k1) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10  // otherwise, a loop over counters has an inner loop and is not vectorised
#endif
  for (int round = 0; round < 10; ++round, k0 += kPhiloxKey0, k1 += kPhiloxKey1) {
    const uint64_t p = uint64_t{a} * kPhilox0, q = uint64_t{c} * kPhilox1;
    a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
    b = static_cast<uint32_t>(q);
    c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
    d = static_cast<uint32_t>(p);
  }
  return {a, b, c, d};
}

}  // namespace sslus
