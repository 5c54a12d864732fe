// Reinterpret the bits of a number as another type, like std::bit_cast of C++20.
#pragma once
#include <cstring>

#include "clones.h"

#if defined(__has_builtin) && !defined(SSLUS_OLD_COMPILER)
#if __has_builtin(__builtin_bit_cast)
#define SSLUS_BIT_CAST
#endif
#endif

namespace sslus {

// GCC before 11 lacks the builtin and does not vectorise loops with memcpy: correct, but slower.
template <typename To, typename From>
SSLUS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
#if defined(SSLUS_BIT_CAST)
  return __builtin_bit_cast(To, from);
#else
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
#endif
}

}  // namespace sslus
