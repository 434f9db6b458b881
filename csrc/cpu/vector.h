// Vectors of FASTDDIM_LANES floats in the compilers' portable notation, with the operations of
// scalar.h. Included inside the namespace of an instruction set, once.

constexpr int LANES = FASTDDIM_LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

FASTDDIM_FN Ints bits(Floats a) { return (Ints)a; }
FASTDDIM_FN Floats from_bits(Ints word) { return (Floats)word; }
FASTDDIM_FN Floats to_float(Ints a) { return __builtin_convertvector(a, Floats); }
FASTDDIM_FN Ints truncated(Floats a) { return __builtin_convertvector(a, Ints); }
FASTDDIM_FN Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }
FASTDDIM_FN Floats splat(Floats, float value) { return value - Floats{}; }
FASTDDIM_FN Doubles splat(Doubles, double value) { return value - Doubles{}; }

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};

// The number of vectors that go through the same operations in step: constants are loaded once for
// all, and the operations of one vector fill the latency of those of another.
constexpr int PARTS = 4;
template <class V>
struct Parts {
  V part[PARTS];
};
using FloatParts = Parts<Floats>;
using IntParts = Parts<Ints>;

template <class R, class Function>
FASTDDIM_FN Parts<R> each(Function function) {
  Parts<R> result;
  for (int i = 0; i < PARTS; ++i) result.part[i] = function(i);
  return result;
}

#define FASTDDIM_EACH(R, expression) \
  each<R>([&](int i) __attribute__((always_inline)) { return expression; })

template <class V>
FASTDDIM_FN Parts<V> operator-(Parts<V> a, Parts<V> b) {
  return FASTDDIM_EACH(V, a.part[i] - b.part[i]);
}
FASTDDIM_FN FloatParts operator-(FloatParts a) { return FASTDDIM_EACH(Floats, -a.part[i]); }
template <class V>
FASTDDIM_FN Parts<V> operator*(Parts<V> a, Parts<V> b) {
  return FASTDDIM_EACH(V, a.part[i] * b.part[i]);
}
template <class V>
FASTDDIM_FN Parts<V> operator^(Parts<V> a, Parts<V> b) {
  return FASTDDIM_EACH(V, a.part[i] ^ b.part[i]);
}

FASTDDIM_FN IntParts operator+(IntParts a, int b) { return FASTDDIM_EACH(Ints, a.part[i] + b); }
FASTDDIM_FN IntParts operator-(IntParts a, int b) { return FASTDDIM_EACH(Ints, a.part[i] - b); }
FASTDDIM_FN IntParts operator>>(IntParts a, int b) { return FASTDDIM_EACH(Ints, a.part[i] >> b); }
FASTDDIM_FN IntParts operator<<(IntParts a, int b) { return FASTDDIM_EACH(Ints, a.part[i] << b); }
FASTDDIM_FN IntParts operator&(IntParts a, int b) { return FASTDDIM_EACH(Ints, a.part[i] & b); }
FASTDDIM_FN IntParts operator!=(IntParts a, int b) { return FASTDDIM_EACH(Ints, a.part[i] != b); }

FASTDDIM_FN IntParts bits(FloatParts a) { return FASTDDIM_EACH(Ints, bits(a.part[i])); }
FASTDDIM_FN FloatParts from_bits(IntParts a) { return FASTDDIM_EACH(Floats, from_bits(a.part[i])); }
FASTDDIM_FN FloatParts to_float(IntParts a) { return FASTDDIM_EACH(Floats, to_float(a.part[i])); }
FASTDDIM_FN IntParts truncated(FloatParts a) { return FASTDDIM_EACH(Ints, truncated(a.part[i])); }
FASTDDIM_FN FloatParts select(IntParts mask, FloatParts a, FloatParts b) {
  return FASTDDIM_EACH(Floats, select(mask.part[i], a.part[i], b.part[i]));
}
FASTDDIM_FN FloatParts splat(FloatParts like, float value) {
  return FASTDDIM_EACH(Floats, splat(like.part[i], value));
}
