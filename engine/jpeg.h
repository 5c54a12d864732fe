// Greyscale baseline JPEGs: the pixels of libjpeg-turbo, in less time.
//
// Most of the time of decoding a JPEG goes into finding where one Huffman code ends and the next
// begins. Here one table look-up yields two codes with their zero runs and values, provided that
// they are short, as most are. Anything but a plain, complete and undamaged file is refused and
// left to libjpeg-turbo, which supports every kind of JPEG and diagnoses damaged ones; so is
// everything on a processor without AVX2 and BMI2. Pixels differ from libjpeg-turbo's only where 16
// bits overflow, which an encoder of 8-bit pixels cannot cause.
//
// ITU-T T.81: B.2 file format, C.2 Huffman tables, F.2.2 decoding.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace sslus::jpeg {

constexpr int kIndexBits = 13;     // of a table, 64 KB; more would outgrow the caches
constexpr int kEndOfBlock = 128;   // steps that lead past the last coefficient from any other
constexpr int kLongest = 16 + 11;  // bits of a code and its value
constexpr size_t kPadding = 64 * kLongest / 8 + 16;  // bytes that a block may read past the end

using Order = std::array<uint8_t, 64 + kEndOfBlock + 16>;

// The index in a block of the k-th coefficient in zigzag order; beyond the end, a dummy index.
constexpr Order make_order() {
  Order order{};
  for (size_t k = 0; k < order.size(); ++k) order[k] = 64;
  int row = 0, column = 0;
  for (size_t k = 0; k < 64; ++k) {
    order[k] = static_cast<uint8_t>(8 * row + column);
    if ((row + column) % 2 == 0) {  // moving up and right
      if (column == 7) {
        ++row;
      } else {
        ++column;
        row -= row > 0;
      }
    } else if (row == 7) {
      ++column;
    } else {
      ++row;
      column -= column > 0;
    }
  }
  return order;
}
constexpr Order kOrder = make_order();

// The value that `size` bits encode: negative if they begin with 0.
inline int extend(uint32_t bits, int size) {
  const int value = static_cast<int>(bits);
  return size && !(bits >> (size - 1)) ? value - (1 << size) + 1 : value;
}

// A Huffman table as in the file: the number of codes of each length, and their symbols in order.
struct Spec {
  uint8_t counts[16];
  uint8_t symbols[256];
};

// The distance of a symbol's coefficient from the previous one. The upper half of an AC symbol is a
// number of zeros, the lower half the size of the value in bits; 0 ends the block. A DC symbol is a
// size, for which the result is unused.
inline int steps_of_symbol(int symbol) { return symbol ? (symbol >> 4) + 1 : kEndOfBlock; }

// The decoded next bits: one code with its value or, for AC, up to two. By byte:
//   0     length of all of it in bits; 0 if the first code and value are longer than the index
//   1, 2  steps to the first and second coefficient; 0 if there is no second code
//   3     length of the first code with its value; if byte 0 is 0, of the first code alone,
//         or 0 if even the code is longer than the index
//   4, 6  the second and the first value; if byte 0 is 0, the symbol of the first code
using Entry = uint64_t;

inline int length_of(Entry e) { return static_cast<uint8_t>(e); }
inline int first_length_of(Entry e) { return static_cast<uint8_t>(e >> 24); }
inline size_t steps_of(Entry e, int which) { return static_cast<uint8_t>(e >> (8 + 8 * which)); }
inline uint16_t value_of(Entry e, int which) {
  return static_cast<uint16_t>(e >> (48 - 16 * which));
}
inline Entry pack(size_t length, size_t first_length, size_t steps, size_t second_steps,
                  uint16_t value, uint16_t second_value) {
  return length | steps << 8 | second_steps << 16 | first_length << 24 |
         static_cast<Entry>(second_value) << 32 | static_cast<Entry>(value) << 48;
}
inline Entry entry_of(int length, int steps, int value) {
  const auto size = static_cast<size_t>(length);
  const auto bits = static_cast<uint16_t>(value);
  return pack(size, size, static_cast<size_t>(steps), 0, bits, bits);
}

struct Huffman {
  Spec spec{};
  bool usable = false;
  Entry entries[1 << kIndexBits];
  uint32_t ends[17];    // the end of the codes of each length, left-aligned in 32 bits
  int32_t offsets[17];  // from a code of each length to the index of its symbol

  // False if the table is invalid. Most files have the same one, so the last one is kept.
  bool prepare(const Spec& wanted, bool dc) {
    if (usable && std::memcmp(&spec, &wanted, sizeof spec) == 0) return true;
    spec = wanted;
    usable = build(dc);
    if (usable && !dc) pair();
    return usable;
  }

 private:
  bool build(bool dc) {
    std::fill(std::begin(entries), std::end(entries), Entry{0});
    uint32_t code = 0, number = 0;
    for (int length = 1; length <= 16; ++length) {
      const uint32_t count = spec.counts[length - 1];
      // No code is all ones (C.2). Too many codes would also overrun the arrays.
      if (number + count > 256 || code + count >= 1u << length) return false;
      offsets[length] = static_cast<int32_t>(number - code);
      for (uint32_t i = 0; i < count; ++i, ++code, ++number) {
        const int symbol = spec.symbols[number], size = dc ? symbol : symbol & 15;
        // 8-bit images have no larger values, and only two symbols without a value: the end of the
        // block and 16 zeros.
        if (size > (dc ? 11 : 10) || (!dc && !size && symbol != 0 && symbol != 0xf0)) return false;
        const int left = kIndexBits - length - size;
        for (uint32_t bits = 0; left >= 0 && bits < 1u << size; ++bits)
          std::fill_n(entries + ((code << size | bits) << left), 1 << left,
                      entry_of(length + size, steps_of_symbol(symbol), extend(bits, size)));
        if (left < 0 && length <= kIndexBits) {
          const int free = kIndexBits - length;
          const Entry known = entry_of(length, 0, symbol) & ~uint64_t{255};
          std::fill_n(entries + (code << free), 1 << free, known);
        }
      }
      ends[length] = code << (32 - length);
      code <<= 1;
    }
    return true;
  }

  // Adds a second code wherever the index holds all of its bits too.
  void pair() {
    const std::vector<Entry> singles(std::begin(entries), std::end(entries));
    for (size_t i = 0; i < singles.size(); ++i) {
      const Entry one = singles[i], two = singles[(i << length_of(one)) % singles.size()];
      const int length = length_of(one) + length_of(two);
      if (length_of(one) && length_of(two) && length <= kIndexBits)
        entries[i] = pack(static_cast<size_t>(length), static_cast<size_t>(length_of(one)),
                          steps_of(one, 0), steps_of(two, 0), value_of(one, 0), value_of(two, 0));
    }
  }
};

// Reads bits. kPadding bytes must be readable past the end.
struct Bits {
  const uint8_t* next;
  uint64_t buffer = 0;  // the next bit is the highest
  int count = 0;        // of bits in the buffer

  void fill() {  // to at least 56 bits
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word = word << 8 | next[i];  // compiles to one load
    buffer |= word >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }

  int64_t taken(const uint8_t* start) const { return 8 * (next - start) - count; }

  size_t index() const { return buffer >> (64 - kIndexBits); }

  void skip(int num) {
    buffer <<= num & 63;
    count -= num;
  }
};

// Decodes a code and value that are longer than the index; 0 if there is no such code.
__attribute__((noinline)) inline Entry long_code(uint64_t buffer, const Huffman& table, bool dc) {
  const Entry known = table.entries[buffer >> (64 - kIndexBits)];
  int length = first_length_of(known), symbol = value_of(known, 0);
  if (!length) {
    length = kIndexBits + 1;
    while (length <= 16 && buffer >> 32 >= table.ends[length]) ++length;
    if (length > 16) return 0;
    const auto code = static_cast<int32_t>(buffer >> (64 - length));
    symbol = table.spec.symbols[table.offsets[length] + code];
  }
  const int size = dc ? symbol : symbol & 15;
  const auto bits = static_cast<uint32_t>(size ? buffer << length >> (64 - size) : 0);
  return entry_of(length + size, steps_of_symbol(symbol), extend(bits, size));
}

// The segments of a file before its scan; false for anything that is not plain.
struct Header {
  uint8_t quantisation[4][64];
  Spec specs[2][4] = {};  // DC and AC
  bool has_quantisation[4] = {}, has_spec[2][4] = {};
  int64_t height = 0, width = 0;
  int component = 0, quantiser = 0, dc = 0, ac = 0;

  // Reads up to the scan, which begins at `at`.
  bool read(const uint8_t* data, size_t size, size_t& at) {
    if (size < 4 || data[0] != 0xff || data[1] != 0xd8) return false;
    at = 2;
    while (at + 4 <= size) {
      const int marker = data[at + 1];
      const auto length = static_cast<size_t>(data[at + 2] << 8 | data[at + 3]);
      if (data[at] != 0xff || length < 2 || at + 2 + length > size) return false;
      const uint8_t* part = data + at + 4;
      at += 2 + length;
      if (marker == 0xda) return scan(part, length - 2);
      if (!segment(marker, part, length - 2)) return false;
    }
    return false;
  }

 private:
  bool segment(int marker, const uint8_t* part, size_t size) {
    switch (marker) {
      case 0xdb:
        for (; size >= 65; part += 65, size -= 65) {
          if (part[0] > 3) return false;  // no such table, or 16-bit quantisation steps
          std::copy(part + 1, part + 65, quantisation[part[0]]);
          has_quantisation[part[0]] = true;
        }
        return size == 0;
      case 0xc4:
        while (size >= 17) {
          const int kind = part[0] >> 4, number = part[0] & 15;
          size_t num = 0;
          for (int i = 1; i <= 16; ++i) num += part[i];
          if (kind > 1 || number > 3 || num > 256 || 17 + num > size) return false;
          Spec& spec = specs[kind][number] = Spec{};
          std::copy(part + 1, part + 17, spec.counts);
          std::copy(part + 17, part + 17 + num, spec.symbols);
          has_spec[kind][number] = true;
          part += 17 + num, size -= 17 + num;
        }
        return size == 0;
      case 0xc0:  // baseline
        if (height || size != 9 || part[0] != 8 || part[5] != 1 || part[7] != 0x11 || part[8] > 3)
          return false;
        height = part[1] << 8 | part[2], width = part[3] << 8 | part[4];
        component = part[6], quantiser = part[8];
        return height && width;
      default:  // only application segments and comments are skipped
        return (marker & 0xf0) == 0xe0 || marker == 0xfe;
    }
  }

  bool scan(const uint8_t* part, size_t size) {
    if (!height || size != 6 || part[0] != 1 || part[1] != component) return false;
    dc = part[2] >> 4, ac = part[2] & 15;
    const bool plain = part[3] == 0 && part[4] == 63 && part[5] == 0;
    return plain && dc <= 3 && ac <= 3 && has_spec[0][dc] && has_spec[1][ac] &&
           has_quantisation[quantiser];
  }
};

// Copies the scan without its stuffed zeros; false if the image does not end after it.
inline bool unstuff(const uint8_t* data, size_t size, std::vector<uint8_t>& out) {
  out.clear();
  out.reserve(size + kPadding);
  while (size) {
    const auto* end = static_cast<const uint8_t*>(std::memchr(data, 0xff, size));
    if (!end || static_cast<size_t>(end - data) + 2 > size) return false;
    out.insert(out.end(), data, end);
    if (end[1] == 0xd9) {
      out.insert(out.end(), kPadding, uint8_t{0});
      return true;
    }
    if (end[1] != 0) return false;
    out.push_back(0xff);
    size -= static_cast<size_t>(end + 2 - data);
    data = end + 2;
  }
  return false;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define SSLUS_FAST __attribute__((target("avx2,bmi2")))

inline bool is_fast() {
  static const bool is = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  return is;
}

struct alignas(16) Block {
  int16_t values[65];  // row by row; the last is the dummy
  bool flat;           // all but the first are 0
};

// Decodes one block's coefficients from the scan; false if it is damaged.
SSLUS_FAST inline bool read_block(Bits& bits, const Huffman& dc, const Huffman& ac,
                                  uint32_t& mean, Block& block) {
  int16_t* to = block.values;
  const __m256i zero = _mm256_setzero_si256();
  for (int i = 0; i < 64; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), zero);
  bits.fill();
  Entry entry = dc.entries[bits.index()];
  if (!length_of(entry) && !(entry = long_code(bits.buffer, dc, true))) return false;
  bits.skip(length_of(entry));
  mean += value_of(entry, 0);  // the file stores differences
  to[0] = static_cast<int16_t>(mean);
  size_t last = 0;
  while (last < 63) {
    bits.fill();  // enough for three entries, or for two and a long code
#pragma GCC unroll 3
    for (int i = 0; i < 3 && last < 63; ++i) {
      entry = ac.entries[bits.index()];
      if (__builtin_expect(!length_of(entry), 0)) {
        entry = long_code(bits.buffer, ac, false);
        if (!entry) return false;
        bits.skip(length_of(entry));
        bits.fill();
        last += steps_of(entry, 0);
        to[kOrder[last]] = static_cast<int16_t>(value_of(entry, 0));
        continue;
      }
      last += steps_of(entry, 0);
      to[kOrder[last]] = static_cast<int16_t>(value_of(entry, 0));
      if (__builtin_expect(last >= 63, 0)) {  // a second code belongs to the next block
        bits.skip(first_length_of(entry));
        break;
      }
      bits.skip(length_of(entry));
      last += steps_of(entry, 1);
      to[kOrder[last]] = static_cast<int16_t>(value_of(entry, 1));
    }
  }
  block.flat = last == kEndOfBlock;
  return last == 63 || last >= kEndOfBlock;
}

// p x + q y of 16-bit numbers, in 32 bits: sums[0] is for the lower half of each lane, sums[1] for
// the upper half.
SSLUS_FAST inline void add_products(__m256i x, __m256i y, int p, int q, __m256i* sums) {
  const __m256i factors = _mm256_set1_epi32(q * 65536 | (p & 0xffff));
  sums[0] = _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), factors);
  sums[1] = _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), factors);
}

// One dimension of the inverse DCT, for 16 columns at once: Loeffler, Ligtenberg and Moschytz
// (ICASSP 1989), in the fixed-point arithmetic of libjpeg's "islow" (jidctint.c), where 8192 is 1.
// Products of sums are expanded here, which gives the same integers.
template <int shift>
SSLUS_FAST inline void transform(__m256i* rows, int offset) {
  __m256i even[4][2], odd[4][2], mixed[2][2], a0[2], a1[2], a2[2], a3[2];
  add_products(rows[0], rows[4], 8192, 8192, a0);
  add_products(rows[0], rows[4], 8192, -8192, a1);
  add_products(rows[2], rows[6], 4433, 4433 - 15137, a2);
  add_products(rows[2], rows[6], 4433 + 6270, 4433, a3);
  const __m256i z3 = _mm256_add_epi16(rows[7], rows[3]), z4 = _mm256_add_epi16(rows[5], rows[1]);
  add_products(z3, z4, 9633 - 16069, 9633, mixed[0]);
  add_products(z3, z4, 9633, 9633 - 3196, mixed[1]);
  add_products(rows[1], rows[7], 12299 - 7373, -7373, odd[0]);
  add_products(rows[3], rows[5], 25172 - 20995, -20995, odd[1]);
  add_products(rows[3], rows[5], -20995, 16819 - 20995, odd[2]);
  add_products(rows[1], rows[7], -7373, 2446 - 7373, odd[3]);
  const __m256i rounded = _mm256_set1_epi32((1 << (shift - 1)) + (offset << shift));
  for (int h = 0; h < 2; ++h) {
    a0[h] = _mm256_add_epi32(a0[h], rounded);
    a1[h] = _mm256_add_epi32(a1[h], rounded);
    even[0][h] = _mm256_add_epi32(a0[h], a3[h]);
    even[1][h] = _mm256_add_epi32(a1[h], a2[h]);
    even[2][h] = _mm256_sub_epi32(a1[h], a2[h]);
    even[3][h] = _mm256_sub_epi32(a0[h], a3[h]);
    for (int i = 0; i < 4; ++i)
      odd[i][h] = _mm256_add_epi32(odd[i][h], mixed[i % 2 == 0][h]);
  }
  for (int i = 0; i < 4; ++i) {
    __m256i first[2], last[2];
    for (int h = 0; h < 2; ++h) {
      first[h] = _mm256_srai_epi32(_mm256_add_epi32(even[i][h], odd[i][h]), shift);
      last[h] = _mm256_srai_epi32(_mm256_sub_epi32(even[i][h], odd[i][h]), shift);
    }
    rows[i] = _mm256_packs_epi32(first[0], first[1]);
    rows[7 - i] = _mm256_packs_epi32(last[0], last[1]);
  }
}

// Transposes two blocks of 8 x 8, as in luma.cpp.
SSLUS_FAST inline void turn(__m256i* rows) {
  __m256i other[8];
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      other[2 * i] = _mm256_unpacklo_epi16(rows[i], rows[i + 4]);
      other[2 * i + 1] = _mm256_unpackhi_epi16(rows[i], rows[i + 4]);
    }
    std::copy(other, other + 8, rows);
  }
}

// Computes the pixels of two blocks.
SSLUS_FAST inline void make_pixels(const Block& a, const Block& b, const __m256i* steps,
                                   uint8_t* to_a, uint8_t* to_b, int64_t stride) {
  __m256i rows[8];
  for (int i = 0; i < 8; ++i) {
    const auto* row_a = reinterpret_cast<const __m128i*>(a.values + 8 * i);
    const auto* row_b = reinterpret_cast<const __m128i*>(b.values + 8 * i);
    rows[i] = _mm256_mullo_epi16(_mm256_setr_m128i(*row_a, *row_b), steps[i]);
  }
  transform<11>(rows, 0);
  turn(rows);
  transform<18>(rows, 128);
  turn(rows);
  for (int i = 0; i < 8; i += 2) {
    const __m256i two = _mm256_packus_epi16(rows[i], rows[i + 1]);
    const __m128i of_a = _mm256_castsi256_si128(two), of_b = _mm256_extracti128_si256(two, 1);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to_a + i * stride), of_a);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to_b + i * stride), of_b);
    _mm_storeh_pd(reinterpret_cast<double*>(to_a + (i + 1) * stride), _mm_castsi128_pd(of_a));
    _mm_storeh_pd(reinterpret_cast<double*>(to_b + (i + 1) * stride), _mm_castsi128_pd(of_b));
  }
}

SSLUS_FAST inline bool decode_scan(const Header& header, const std::vector<uint8_t>& data,
                                   const Huffman& dc, const Huffman& ac, uint8_t* out) {
  thread_local std::vector<Block> blocks;  // of eight rows of pixels; an even number of blocks
  thread_local std::vector<uint8_t> band;  // these rows, if they reach beyond the image
  const int64_t height = header.height, width = header.width;
  const int64_t num_blocks = (width + 7) / 8, wide = (num_blocks + 1) / 2 * 16;
  blocks.resize(static_cast<size_t>(wide / 8));
  band.resize(static_cast<size_t>(8 * wide));
  alignas(32) int16_t steps[8][16];
  for (int k = 0; k < 64; ++k)
    for (int half = 0; half < 16; half += 8)
      steps[kOrder[k] / 8][kOrder[k] % 8 + half] = header.quantisation[header.quantiser][k];
  const auto num_bits = static_cast<int64_t>(8 * (data.size() - kPadding));
  Bits bits{data.data()};
  uint32_t mean = 0;
  for (int64_t y = 0; y < height; y += 8) {
    for (int64_t i = 0; i < num_blocks; ++i)
      if (bits.taken(data.data()) > num_bits || !read_block(bits, dc, ac, mean, blocks[i]))
        return false;
    const bool inside = y + 8 <= height && width == wide;
    uint8_t* to = inside ? out + y * width : band.data();
    for (int64_t i = 0; i < wide / 8; i += 2) {
      const Block &a = blocks[i], &b = blocks[i + 1];
      if (a.flat && b.flat) {
        for (int half = 0; half < 2; ++half) {
          const int value = (half ? b : a).values[0] * steps[0][0];
          const int level = std::clamp(((value + 4) >> 3) + 128, 0, 255);
          for (int row = 0; row < 8; ++row) std::memset(to + row * wide + 8 * half, level, 8);
        }
      } else {
        make_pixels(a, b, reinterpret_cast<const __m256i*>(steps), to, to + 8, wide);
      }
      to += 16;
    }
    if (!inside)
      for (int64_t row = 0; row < std::min<int64_t>(8, height - y); ++row)
        std::copy_n(band.data() + row * wide, width, out + (y + row) * width);
  }
  const int64_t left = num_bits - bits.taken(data.data());
  return left >= 0 && left < 8;
}

#else
inline bool is_fast() { return false; }
inline bool decode_scan(const Header&, const std::vector<uint8_t>&, const Huffman&, const Huffman&,
                 uint8_t*) {
  return false;
}
#endif

// Decodes a file into out (height, width). False, with undefined contents of out, if it is not a
// plain, complete and undamaged JPEG of this size.
inline bool decode(const uint8_t* data, size_t size, int64_t height, int64_t width, uint8_t* out) {
  thread_local std::vector<uint8_t> scan;  // kept for the next file, as are the tables
  thread_local Huffman dc, ac;
  Header header;
  size_t at = 0;
  return is_fast() && header.read(data, size, at) && header.height == height &&
         header.width == width && dc.prepare(header.specs[0][header.dc], true) &&
         ac.prepare(header.specs[1][header.ac], false) && unstuff(data + at, size - at, scan) &&
         decode_scan(header, scan, dc, ac, out);
}

}  // namespace sslus::jpeg
