// Function multiversioning: functions are compiled for several instruction sets.
#pragma once

// One wheel runs everywhere: the loader picks the widest version that the processor supports.
// With GCC these functions are noinline, because inlining would take the default version. Small
// templates that they call must be inlined, to be compiled for the same instruction set as their
// caller.
#if !defined(__x86_64__) || !defined(__GLIBC__) || defined(SSLUS_NO_CLONES)
#define SSLUS_CLONES
#elif defined(__clang__) && __clang_major__ >= 17  // never inlines them, and forbids to say so
#define SSLUS_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__clang__)
#define SSLUS_CLONES __attribute__((target_clones("avx2", "default")))
#elif __GNUC__ >= 12
#define SSLUS_CLONES \
  __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // older compilers know only individual extensions
#define SSLUS_CLONES __attribute__((noinline, target_clones("avx2", "default")))
#endif
#if defined(__GNUC__)
#define SSLUS_INLINE inline __attribute__((always_inline))
#else
#define SSLUS_INLINE inline
#endif
