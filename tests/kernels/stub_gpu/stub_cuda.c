/* A libcuda.so.1 without a GPU: two devices with 132 processors and 227 KiB of shared memory, of the
 * architecture STUB_GPU_ARCH (90 if it is not set). It has what halimede.kernels.gpu_driver and Triton's own
 * driver call. It refuses what a real one refuses: code of another GPU, a thread without a context, too much
 * shared memory. Launches, loads and attributes go to the log. */
#include "stub_gpu.h"
#include "cuda.h"

#define SHARED_OPTIN (227 << 10)
#define SHARED_DEFAULT (48 << 10)
#define FAIL(call)                                                                                             \
  do {                                                                                                         \
    int code = failure(call);                                                                                  \
    if (code)                                                                                                  \
      return code;                                                                                             \
  } while (0)

static char contexts[NUM_DEVICES];
static __thread CUcontext current;

static int device_of(CUcontext context) { return (int)((char *)context - contexts); }

static int compute_capability(void) { return settings.arch[0] ? atoi(settings.arch) : 90; }

CUresult cuInit(unsigned flags) {
  FAIL("cuInit");
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
  switch (error) {
  case CUDA_ERROR_INVALID_VALUE: *name = "CUDA_ERROR_INVALID_VALUE"; break;
  case CUDA_ERROR_NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
  case CUDA_ERROR_INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
  case CUDA_ERROR_INVALID_IMAGE: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
  case CUDA_ERROR_INVALID_CONTEXT: *name = "CUDA_ERROR_INVALID_CONTEXT"; break;
  case CUDA_ERROR_NO_BINARY_FOR_GPU: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
  case CUDA_ERROR_INVALID_HANDLE: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
  case CUDA_ERROR_NOT_FOUND: *name = "CUDA_ERROR_NOT_FOUND"; break;
  case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
  default: *name = NULL; return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  static __thread char said[64];
  if (cuGetErrorName(error, text) != CUDA_SUCCESS)
    return CUDA_ERROR_INVALID_VALUE;
  snprintf(said, sizeof said, "the stub's text of error %d", error);
  *text = said;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  *count = NUM_DEVICES;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  FAIL("cuDeviceGet");
  if (ordinal < 0 || ordinal >= NUM_DEVICES)
    return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  FAIL("cuDeviceGetAttribute");
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = compute_capability() / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = compute_capability() % 10; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OPTIN; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  FAIL("cuDevicePrimaryCtxRetain");
  *context = (CUcontext)&contexts[device];
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  FAIL("cuCtxGetCurrent");
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  FAIL("cuCtxSetCurrent");
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  *device = device_of(current);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *handle, const void *image) {
  FAIL("cuModuleLoadData");
  const Elf64_Ehdr *header = image;
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (memcmp(image, ELFMAG, SELFMAG) != 0 || header->e_machine != 0xbe)
    return CUDA_ERROR_INVALID_IMAGE;
  /* The architecture's number has moved in the flags with the eighth version of the format. */
  int built_for = header->e_ident[EI_ABIVERSION] >= 8 ? header->e_flags >> 8 & 0xff : header->e_flags & 0xff;
  if (built_for / 10 != compute_capability() / 10 || built_for > compute_capability())
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  Module *module = malloc(sizeof *module);
  *module = (Module){image, image_size(header), device_of(current)};
  note("{\"call\": \"load\", \"device\": %d, \"arch\": %d}", module->device, built_for);
  *handle = (CUmodule)module;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  FAIL("cuModuleGetFunction");
  if (!has_function((Module *)module, name))
    return CUDA_ERROR_NOT_FOUND;
  Function *found = find_function(name, ((Module *)module)->device);
  found->max_dynamic_shared = SHARED_DEFAULT - settings.static_shared;
  *function = (CUfunction)found;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  FAIL("cuFuncGetAttribute");
  *value = attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES       ? settings.static_shared
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  FAIL("cuFuncSetAttribute");
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE;
  if (value + settings.static_shared > SHARED_OPTIN)
    return CUDA_ERROR_INVALID_VALUE;
  ((Function *)function)->max_dynamic_shared = value;
  note("{\"call\": \"allow_shared\", \"function\": \"%s\", \"bytes\": %d}", ((Function *)function)->name, value);
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  FAIL("cuFuncSetCacheConfig");
  note("{\"call\": \"cache_config\", \"function\": \"%s\", \"config\": %d}", ((Function *)function)->name, config);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra) {
  FAIL("cuLaunchKernel");
  const Function *function = (Function *)handle;
  unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  if (!current)
    return CUDA_ERROR_INVALID_CONTEXT;
  if (device_of(current) != function->device)
    return CUDA_ERROR_INVALID_HANDLE;
  if (!grid_x || !grid_y || !grid_z || grid_x > INT32_MAX || grid_y > 65535 || grid_z > 65535 || extra)
    return CUDA_ERROR_INVALID_VALUE;
  if (!block_x || block_x * block_y * block_z > 1024 || (int)shared > function->max_dynamic_shared)
    return CUDA_ERROR_INVALID_VALUE;
  if (!are_aligned(function, parameters))
    return CUDA_ERROR_MISALIGNED_ADDRESS;
  note_launch(function, grid, block, shared, stream, parameters);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  if (config->numAttrs)
    return CUDA_ERROR_NOT_SUPPORTED;
  return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                        config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream,
                        parameters, extra);
}
