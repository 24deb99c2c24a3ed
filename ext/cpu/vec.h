// Vectors of numbers in GCC's and Clang's vector types, which compile to whatever the machine level has (x86-64, AVX2,
// AVX-512, NEON). Every *.simd.cpp is compiled once a level, into the namespace LEVEL; see level.h.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

// Bytes of a vector. NATIVE: what a register holds; the compiler keeps wider ones in memory, and compares them number
// by number, which makes loops of level v3 4 to 20 times slower. A file asks for it by #define WIDTH NATIVE before it
// includes this one.
#if defined(__AVX512F__)
#define NATIVE 64
#elif defined(__AVX__)
#define NATIVE 32
#else
#define NATIVE 16
#endif
#ifndef WIDTH
#define WIDTH 64
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace LEVEL {
namespace {

typedef float f32 __attribute__((vector_size(WIDTH)));
typedef double f64 __attribute__((vector_size(WIDTH)));
typedef uint32_t u32 __attribute__((vector_size(WIDTH)));
typedef uint16_t u16 __attribute__((vector_size(WIDTH / 2)));

#define INLINE inline __attribute__((always_inline))

// What a number of type T is computed in, and how many make a vector.
template <class T>
struct Of {
  typedef f32 V;
  typedef float S;
  static constexpr int n = WIDTH / 4;
};
template <>
struct Of<double> {
  typedef f64 V;
  typedef double S;
  static constexpr int n = WIDTH / 8;
};

INLINE f32 load(const float* p) {
  f32 v;
  memcpy(&v, p, WIDTH);
  return v;
}
INLINE f64 load(const double* p) {
  f64 v;
  memcpy(&v, p, WIDTH);
  return v;
}
INLINE f32 load(const bf16* p) {
  u16 h;
  memcpy(&h, p, WIDTH / 2);
  u32 w = __builtin_convertvector(h, u32) << 16;
  f32 v;
  memcpy(&v, &w, WIDTH);
  return v;
}

INLINE float widen(uint16_t h) {  // IEEE half -> single, subnormals, infinities and NaN included
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13, bits;
  float f;
  if (rest < (0x400u << 13)) {
    f = float(h & 0x3ff) * 0x1p-24f;
    memcpy(&bits, &f, 4);
  } else {
    bits = rest + (rest >= (0x7c00u << 13) ? 0x70000000u : 0x38000000u);
  }
  bits |= sign;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE uint16_t narrow(float f) {  // single -> IEEE half, to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal: the adder rounds
    float g;
    memcpy(&g, &bits, 4);
    g += 0.5f;
    memcpy(&bits, &g, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  return sign | uint16_t((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}

INLINE f32 load(const fp16* p) {
  f32 v;
#if defined(__AVX512F__)
  __m512 w = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  memcpy(&v, &w, WIDTH);
#elif defined(__F16C__)
  __m256 w[WIDTH / 32];
  for (int i = 0; i < WIDTH / 32; i++)
    w[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
  memcpy(&v, w, WIDTH);
#else
  for (int i = 0; i < WIDTH / 4; i++) v[i] = widen(p[i].bits);
#endif
  return v;
}

INLINE void store(float* p, f32 v) { memcpy(p, &v, WIDTH); }
INLINE void store(double* p, f64 v) { memcpy(p, &v, WIDTH); }
INLINE void store(bf16* p, f32 v) {  // to nearest, ties to even; NaN stays NaN
  u32 w;
  memcpy(&w, &v, WIDTH);
  u32 rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
  u32 quiet = (w >> 16) | 0x40;
  u32 mask = -((0x7f800000 - (w & 0x7fffffff)) >> 31);  // all bits of a NaN; a comparison compiles badly below AVX-512
  u16 h = __builtin_convertvector((rounded & ~mask) | (quiet & mask), u16);
  memcpy(p, &h, WIDTH / 2);
}
INLINE void store(fp16* p, f32 v) {
#if defined(__AVX512F__)
  __m512 w;
  memcpy(&w, &v, WIDTH);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  __m256 w[WIDTH / 32];
  memcpy(w, &v, WIDTH);
  for (int i = 0; i < WIDTH / 32; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(w[i], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < WIDTH / 4; i++) p[i].bits = narrow(v[i]);
#endif
}

// The first `n` numbers only, n < Of<T>::n; the others read as zero and are not written.
template <class T>
INLINE typename Of<T>::V load(const T* p, int n) {
  T part[Of<T>::n];
  memset(part, 0, sizeof part);
  memcpy(part, p, sizeof(T) * n);
  return load(part);
}
template <class T>
INLINE void store(T* p, typename Of<T>::V v, int n) {
  T part[Of<T>::n];
  store(part, v);
  memcpy(p, part, sizeof(T) * n);
}

}  // namespace
}  // namespace LEVEL
