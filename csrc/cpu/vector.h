// Vectors of FASTDDIM_LANES floats in the compilers' portable notation, with the operations of scalar.h. Included
// inside the namespace of an instruction set, once.

constexpr int LANES = FASTDDIM_LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

FASTDDIM_FN Ints bits(Floats a) { return (Ints)a; }
FASTDDIM_FN Floats from_bits(Ints word) { return (Floats)word; }
FASTDDIM_FN Floats to_float(Ints a) { return __builtin_convertvector(a, Floats); }
FASTDDIM_FN Ints truncated(Floats a) { return __builtin_convertvector(a, Ints); }
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
