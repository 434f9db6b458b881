// A stand-in for the driver's library, libcuda.so.1, where there is no driver: the modules that
// Triton builds link to it. Nothing of it is called but what finds a function's address.

#define STUB(name) \
  int name(void) { return 0; }

STUB(cuCtxGetCurrent)
STUB(cuCtxGetLimit)
STUB(cuCtxSetCurrent)
STUB(cuCtxSetLimit)
STUB(cuDeviceGet)
STUB(cuDeviceGetAttribute)
STUB(cuDevicePrimaryCtxRetain)
STUB(cuFuncGetAttribute)
STUB(cuFuncSetAttribute)
STUB(cuFuncSetCacheConfig)
STUB(cuGetErrorString)
STUB(cuLaunchKernelEx)
STUB(cuModuleGetFunction)
STUB(cuModuleLoadData)
STUB(cuOccupancyMaxActiveClusters)
STUB(cuPointerGetAttribute)
STUB(cuTensorMapEncodeTiled)
