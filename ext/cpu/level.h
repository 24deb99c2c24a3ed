// Machine levels. A *.simd.cpp holds the loops, without torch, and is compiled once a level: x86-64 as it is, v3 (AVX2,
// FMA, F16C) and v4 (AVX-512); elsewhere once. The library picks at run time, so one build serves every node of a cluster.
#pragma once

#if defined(LEVELS)
#define KERNEL(declaration) \
  namespace base {          \
  declaration;              \
  }                         \
  namespace v3 {            \
  declaration;              \
  }                         \
  namespace v4 {            \
  declaration;              \
  }
#define PICK(name) \
  (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") \
       ? v4::name                                                                                                   \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? v3::name  \
                                                                                                        : base::name)
#else
#define KERNEL(declaration) \
  namespace base {          \
  declaration;              \
  }
#define PICK(name) base::name
#endif
