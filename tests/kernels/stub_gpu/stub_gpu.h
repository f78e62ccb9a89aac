/* What the two drivers that only pretend share: settings, the log, and a look into machine code. */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_FUNCTIONS 256
#define MAX_PARAMETERS 64
#define NUM_DEVICES 2

typedef struct {
  const char *image;
  size_t size;
  int device;
} Module;

typedef struct {
  char name[256];
  int device;
  int max_dynamic_shared;
  int num_parameters; /* -1: nobody said, and they are not logged */
  int parameter_sizes[MAX_PARAMETERS];
} Function;

static struct {
  char log[4096], arch[64], fail_call[64];
  int fail_code, static_shared, fail_once;
} settings;

static Function functions[MAX_FUNCTIONS];
static int num_functions;
static pthread_mutex_t functions_lock = PTHREAD_MUTEX_INITIALIZER;

static const char *variable(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

/* Reads the environment again. A getenv in every launch would be most of its time. */
__attribute__((constructor, visibility("default"))) void stub_gpu_reload(void) {
  snprintf(settings.log, sizeof settings.log, "%s", variable("STUB_GPU_LOG", ""));
  snprintf(settings.arch, sizeof settings.arch, "%s", variable("STUB_GPU_ARCH", ""));
  settings.static_shared = atoi(variable("STUB_GPU_STATIC_SHARED", "0"));
  settings.fail_once = 0;
  settings.fail_call[0] = 0;
  /* call:code, or call:code:once */
  char once[8] = "";
  sscanf(variable("STUB_GPU_FAIL", ""), "%63[^:]:%d:%7s", settings.fail_call, &settings.fail_code, once);
  settings.fail_once = strcmp(once, "once") == 0;
}

static int failure(const char *call) {
  if (strcmp(settings.fail_call, call) != 0)
    return 0;
  if (settings.fail_once)
    settings.fail_call[0] = 0;
  return settings.fail_code;
}

/* One line of JSON; a single write, so that lines of several threads do not mix. */
static void note(const char *format, ...) {
  if (!settings.log[0])
    return;
  char line[8192];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line - 1, format, arguments);
  va_end(arguments);
  line[length++] = '\n';
  int file = open(settings.log, O_WRONLY | O_CREAT | O_APPEND, 0600);
  if (file < 0 || write(file, line, length) != length)
    abort();
  close(file);
}

static Function *find_function(const char *name, int device) {
  Function *found = NULL;
  pthread_mutex_lock(&functions_lock);
  for (int i = 0; i < num_functions; i++)
    if (functions[i].device == device && strcmp(functions[i].name, name) == 0)
      found = &functions[i];
  if (!found && num_functions < MAX_FUNCTIONS) {
    found = &functions[num_functions++];
    snprintf(found->name, sizeof found->name, "%s", name);
    found->device = device;
    found->num_parameters = -1;
  }
  pthread_mutex_unlock(&functions_lock);
  if (!found)
    abort();
  return found;
}

/* Tells the sizes in bytes of what the kernel of that name takes, so that launches of it log the values. */
void stub_gpu_parameters(const char *name, int count, const int *sizes) {
  for (int device = 0; device < NUM_DEVICES; device++) {
    Function *function = find_function(name, device);
    function->num_parameters = count;
    memcpy(function->parameter_sizes, sizes, count * sizeof *sizes);
  }
}

static size_t image_size(const Elf64_Ehdr *header) {
  size_t sections = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t segments = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  return sections > segments ? sections : segments;
}

static int has_function(const Module *module, const char *name) {
  return memmem(module->image, module->size, name, strlen(name) + 1) != NULL;
}

/* Whether each parameter lies where a number of its size may lie. */
static int are_aligned(const Function *function, void **parameters) {
  for (int i = 0; i < function->num_parameters; i++)
    if ((uintptr_t)parameters[i] % function->parameter_sizes[i])
      return 0;
  return 1;
}

static void note_launch(const Function *function, const unsigned *grid, const unsigned *block, unsigned shared,
                        const void *stream, void **parameters) {
  if (!settings.log[0])
    return;
  char values[4096];
  int used = 0;
  values[0] = 0;
  for (int i = 0; i < function->num_parameters; i++) {
    used += sprintf(values + used, i ? ", \"" : "\"");
    for (int byte = 0; byte < function->parameter_sizes[i]; byte++)
      used += sprintf(values + used, "%02x", ((const unsigned char *)parameters[i])[byte]);
    used += sprintf(values + used, "\"");
  }
  note("{\"call\": \"launch\", \"function\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
       "\"shared\": %u, \"stream\": %lu, \"device\": %d, \"parameters\": [%s]}",
       function->name, grid[0], grid[1], grid[2], block[0], block[1], block[2], shared, (unsigned long)stream,
       function->device, values);
}
