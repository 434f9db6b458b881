// Lets a PyTorch without CUDA run modules and operators on fake CUDA tensors: their kernels ask for
// a guard of the device, and there is none in such a build.

#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

}  // namespace
