// The kernel for any CPU: one element at a time, unless the compiler vectorises it.

#define FASTDDIM_NAMESPACE fastddim_plain
#include "../scalar.h"

#define FASTDDIM_LANES 1
#include "kernel.h"

namespace fastddim {
const Kernels PLAIN = {"plain", &FASTDDIM_NAMESPACE::update, &FASTDDIM_NAMESPACE::backward,
                       &FASTDDIM_NAMESPACE::normal, &FASTDDIM_NAMESPACE::fit};
}
