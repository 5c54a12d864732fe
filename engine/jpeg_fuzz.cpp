// Decodes random and damaged JPEGs: `jpeg_fuzz [RUNS]`, built by tools/sanitize.sh.
//
// Files and images are allocated with exactly their size, so that sanitizers detect any overrun.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "jpeg.h"

using namespace sslus::jpeg;

namespace {

std::mt19937 generator(1);

int whole(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<uint32_t>(high - low + 1));
}

void add(std::vector<uint8_t>& file, int marker, const std::vector<uint8_t>& part) {
  const size_t length = part.size() + 2;
  for (size_t byte : {size_t{0xff}, static_cast<size_t>(marker), length >> 8, length & 255})
    file.push_back(static_cast<uint8_t>(byte));
  file.insert(file.end(), part.begin(), part.end());
}

// A table that uses nearly all codes, so that random bits are mostly valid codes.
std::vector<uint8_t> random_table(bool dc) {
  std::vector<uint8_t> part(17);
  part[0] = dc ? 0 : 16;
  int free = 1;  // codes of the current length
  for (int length = 1; length <= 16; ++length) {
    free = std::min(2 * free, 512);
    const int left = 256 - static_cast<int>(part.size() - 17);
    const int used = length < 2 ? 0 : whole(0, std::min({free - 1, left, 40}));
    part[static_cast<size_t>(length)] = static_cast<uint8_t>(used);
    free -= used;
    for (int i = 0; i < used; ++i) {
      const int size = whole(0, dc ? 11 : 10), run = size ? whole(0, 15) : 15 * whole(0, 1);
      part.push_back(static_cast<uint8_t>(dc ? size : run << 4 | size));
    }
  }
  return part;
}

std::vector<uint8_t> random_file(int height, int width) {
  std::vector<uint8_t> file{0xff, 0xd8}, steps(65);
  for (size_t k = 1; k < 65; ++k) steps[k] = static_cast<uint8_t>(whole(1, whole(1, 255)));
  add(file, 0xdb, steps);
  const auto byte = [](int x) { return static_cast<uint8_t>(x & 255); };
  add(file, 0xc0, {8, byte(height >> 8), byte(height), byte(width >> 8), byte(width), 1, 1, 17, 0});
  add(file, 0xc4, random_table(true));
  add(file, 0xc4, random_table(false));
  add(file, 0xda, {1, 1, 0, 0, 63, 0});
  for (int i = whole(0, height * width); i > 0; --i) {
    file.push_back(byte(whole(0, 255)));
    if (file.back() == 0xff) file.push_back(0);
  }
  file.push_back(0xff);
  file.push_back(0xd9);
  return file;
}

}  // namespace

int main(int argc, char** argv) {
  const int runs = argc > 1 ? std::atoi(argv[1]) : 3000;
  if (!is_fast()) return std::puts("this processor has no AVX2: nothing to test"), 0;
  int num_read = 0;
  auto dc = std::make_unique<Huffman>(), ac = std::make_unique<Huffman>();
  for (int run = 0; run < runs; ++run) {
    const int height = whole(1, 70), width = whole(1, 70);
    std::vector<uint8_t> file = random_file(height, width);
    const int num_flips = whole(0, 3) ? 0 : whole(1, 4);
    for (int i = 0; i < num_flips; ++i)
      file[generator() % file.size()] = static_cast<uint8_t>(whole(0, 255));
    if (!whole(0, 7)) file.resize(generator() % file.size());
    std::unique_ptr<uint8_t[]> data(new uint8_t[file.size()]);
    std::copy(file.begin(), file.end(), data.get());
    std::unique_ptr<uint8_t[]> image(new uint8_t[static_cast<size_t>(height * width)]);
    decode(data.get(), file.size(), height, width, image.get());
    Header header;
    std::vector<uint8_t> scan;
    size_t at = 0;
    num_read += header.read(data.get(), file.size(), at) && dc->prepare(header.specs[0][0], true) &&
                ac->prepare(header.specs[1][0], false) &&
                unstuff(data.get() + at, file.size() - at, scan);
  }
  std::printf("%d of %d files could be read up to their pixels\n", num_read, runs);
  return num_read < runs / 2;  // failure: too few files get past the header
}
