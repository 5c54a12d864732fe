// The bits of a number as another type: std::bit_cast of C++20.
#pragma once
#include <cstring>

#include "clones.h"

#if defined(__has_builtin) && !defined(SSLUS_NO_BIT_CAST)
#if __has_builtin(__builtin_bit_cast)
#define SSLUS_BIT_CAST
#endif
#endif

namespace sslus {

// GCC before 11 has no builtin, and does not vectorise a loop with memcpy in it: right, but slower.
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
