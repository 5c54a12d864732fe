// Unpacks random bytes: `packbits_fuzz [RUNS]`, built by tools/sanitize.sh.
//
// Both sides are allocated with exactly their size, so that sanitizers detect any overrun.
#include "packbits.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 3000;
  std::mt19937 generator(1);
  int num_full = 0;
  for (int run = 0; run < runs; ++run) {
    const size_t from = generator() % 300, to = generator() % 600;
    const std::unique_ptr<uint8_t[]> packed(new uint8_t[from]), out(new uint8_t[to]);
    for (size_t i = 0; i < from; ++i) packed[i] = static_cast<uint8_t>(generator());
    const int64_t done = sslus::packbits::unpack(packed.get(), static_cast<int64_t>(from),
                                                 out.get(), static_cast<int64_t>(to));
    if (done < 0 || done > static_cast<int64_t>(to)) return std::puts("wrong count"), 1;
    num_full += done == static_cast<int64_t>(to);
  }
  std::printf("%d of %d outputs were filled\n", num_full, runs);
  return num_full < runs / 10 || num_full > runs * 9 / 10;  // failure: one end is hardly tested
}
