/* A libamdhip64.so without a GPU: two devices with 132 processors and 64 KiB of shared memory, of the
 * architecture STUB_GPU_ARCH (gfx942 if it is not set). See stub_cuda.c. */
#define __HIP_PLATFORM_AMD__
#include "stub_gpu.h"
#include <dlfcn.h>
#include <hip/hip_runtime_api.h>

#define SHARED_MEMORY (64 << 10)
#define FAIL(call)                                                                                             \
  do {                                                                                                         \
    int code = failure(call);                                                                                  \
    if (code)                                                                                                  \
      return last_error = code;                                                                                \
  } while (0)

static __thread int current_device;
static __thread int last_error;

static const char *arch(void) { return settings.arch[0] ? settings.arch : "gfx942"; }

/* The number that an ELF file of that architecture has in its flags; 0 where this stub does not know it. */
static unsigned machine_of(const char *name) {
  return strcmp(name, "gfx942") == 0 ? 0x4c : strcmp(name, "gfx1100") == 0 ? 0x41 : 0;
}

hipError_t hipDriverGetVersion(int *version) {
  *version = 70000000;
  return hipSuccess;
}

hipError_t hipGetProcAddress(const char *symbol, void **function, int version, uint64_t flags,
                             hipDriverProcAddressQueryResult *status) {
  const char *name = strcmp(symbol, "hipGetDeviceProperties") == 0 ? "hipGetDevicePropertiesR0600" : symbol;
  Dl_info self; /* this library is not among the global ones */
  dladdr((void *)hipDriverGetVersion, &self);
  *function = dlsym(dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
  return *function ? hipSuccess : hipErrorNotFound;
}

const char *hipGetErrorName(hipError_t error) {
  switch (error) {
  case hipErrorInvalidValue: return "hipErrorInvalidValue";
  case hipErrorInvalidDevice: return "hipErrorInvalidDevice";
  case hipErrorInvalidImage: return "hipErrorInvalidImage";
  case hipErrorNoBinaryForGpu: return "hipErrorNoBinaryForGpu";
  case hipErrorInvalidHandle: return "hipErrorInvalidHandle";
  case hipErrorNotFound: return "hipErrorNotFound";
  case hipErrorIllegalAddress: return "hipErrorIllegalAddress";
  default: return NULL;
  }
}

const char *hipGetErrorString(hipError_t error) {
  static __thread char said[64];
  snprintf(said, sizeof said, "the stub's text of error %d", error);
  return said;
}

hipError_t hipGetLastError(void) {
  int error = last_error;
  last_error = hipSuccess;
  return error;
}

hipError_t hipGetDeviceCount(int *count) {
  *count = NUM_DEVICES;
  return hipSuccess;
}

hipError_t hipGetDevice(int *device) {
  FAIL("hipGetDevice");
  *device = current_device;
  return hipSuccess;
}

hipError_t hipSetDevice(int device) {
  FAIL("hipSetDevice");
  if (device < 0 || device >= NUM_DEVICES)
    return last_error = hipErrorInvalidDevice;
  current_device = device;
  return hipSuccess;
}

hipError_t hipDeviceGetAttribute(int *value, hipDeviceAttribute_t attribute, int device) {
  FAIL("hipDeviceGetAttribute");
  *value = attribute == hipDeviceAttributeMaxSharedMemoryPerBlock ? SHARED_MEMORY
           : attribute == hipDeviceAttributeMultiprocessorCount   ? 132
                                                                  : 1;
  return hipSuccess;
}

/* The header's macro makes this hipGetDevicePropertiesR0600. */
hipError_t hipGetDeviceProperties(hipDeviceProp_t *properties, int device) {
  memset(properties, 0, sizeof *properties);
  snprintf(properties->gcnArchName, sizeof properties->gcnArchName, "%s:sramecc+:xnack-", arch());
  properties->sharedMemPerBlock = SHARED_MEMORY;
  properties->multiProcessorCount = 132;
  properties->warpSize = strncmp(arch(), "gfx1", 4) == 0 ? 32 : 64;
  properties->regsPerBlock = 65536;
  return hipSuccess;
}

hipError_t hipModuleLoadData(hipModule_t *handle, const void *image) {
  FAIL("hipModuleLoadData");
  const Elf64_Ehdr *header = image;
  if (memcmp(image, ELFMAG, SELFMAG) != 0 || header->e_machine != 0xe0)
    return last_error = hipErrorInvalidImage;
  if (machine_of(arch()) && machine_of(arch()) != (header->e_flags & 0xff))
    return last_error = hipErrorNoBinaryForGpu;
  Module *module = malloc(sizeof *module);
  *module = (Module){image, image_size(header), current_device};
  note("{\"call\": \"load\", \"device\": %d}", current_device);
  *handle = (hipModule_t)module;
  return hipSuccess;
}

hipError_t hipModuleLoadDataEx(hipModule_t *module, const void *image, unsigned num_options,
                               hipJitOption *options, void **values) {
  return hipModuleLoadData(module, image);
}

hipError_t hipModuleUnload(hipModule_t module) {
  free(module);
  return hipSuccess;
}

hipError_t hipModuleGetFunction(hipFunction_t *function, hipModule_t module, const char *name) {
  FAIL("hipModuleGetFunction");
  if (!has_function((Module *)module, name))
    return last_error = hipErrorNotFound;
  *function = (hipFunction_t)find_function(name, ((Module *)module)->device);
  return hipSuccess;
}

hipError_t hipFuncGetAttribute(int *value, hipFunction_attribute attribute, hipFunction_t function) {
  *value = attribute == HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return hipSuccess;
}

hipError_t hipPointerGetAttribute(void *value, hipPointer_attribute attribute, hipDeviceptr_t pointer) {
  *(hipDeviceptr_t *)value = pointer;
  return hipSuccess;
}

hipError_t hipModuleLaunchKernel(hipFunction_t handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                 unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                 hipStream_t stream, void **parameters, void **extra) {
  FAIL("hipModuleLaunchKernel");
  const Function *function = (Function *)handle;
  unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
  if (function->device != current_device)
    return last_error = hipErrorInvalidHandle;
  if (!grid_x || !grid_y || !grid_z || (uint64_t)grid_x * block_x >> 32 || extra || shared > SHARED_MEMORY ||
      !block_x || block_x * block_y * block_z > 1024 || !are_aligned(function, parameters))
    return last_error = hipErrorInvalidValue;
  note_launch(function, grid, block, shared, stream, parameters);
  return hipSuccess;
}

hipError_t hipModuleLaunchCooperativeKernel(hipFunction_t function, unsigned grid_x, unsigned grid_y,
                                            unsigned grid_z, unsigned block_x, unsigned block_y,
                                            unsigned block_z, unsigned shared, hipStream_t stream,
                                            void **parameters) {
  return hipErrorNotSupported;
}
