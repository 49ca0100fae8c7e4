// Stands for libcuda.so.1 in tests: keeps what it was asked for, and launches nothing.
#include <cstdint>
#include <cstring>

extern "C" {
struct Launch {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared;
  uint64_t words[8];
};
Launch fake_last;
int fake_attribute[2];
int fake_pushes, fake_pops, fake_fail, fake_words = 8;
uint64_t fake_current;

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* out) { *out = 12080; return 0; }
int cuGetErrorString(int, const char** out) { *out = "out of cheese"; return 0; }
int cuDeviceGet(int* out, int ordinal) { *out = ordinal + 10; return 0; }
int cuDevicePrimaryCtxRetain(uint64_t* out, int device) { *out = 1000 + device; return 0; }
int cuCtxGetCurrent(uint64_t* out) { *out = fake_current; return 0; }
int cuCtxPushCurrent_v2(uint64_t context) { fake_pushes++; fake_current = context; return 0; }
int cuCtxPopCurrent_v2(uint64_t* out) { fake_pops++; *out = fake_current; fake_current = 0; return 0; }
int cuModuleLoadData(uint64_t* out, const char* image) { *out = 500 + (unsigned char)image[0]; return 0; }
int cuModuleGetFunction(uint64_t* out, uint64_t module, const char* name) {
  *out = module * 1000 + strlen(name);
  return strcmp(name, "missing") == 0 ? 500 : 0;
}
int cuFuncSetAttribute(uint64_t, int attribute, int value) {
  fake_attribute[0] = attribute;
  fake_attribute[1] = value;
  return 0;
}
int cuLaunchKernel(uint64_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, uint64_t stream, void** arguments, void** extra) {
  if (fake_fail || extra) return 700;
  fake_last = {function, stream, {gx, gy, gz}, {bx, by, bz}, shared, {}};
  for (int i = 0; i < fake_words; i++) fake_last.words[i] = *(uint64_t*)arguments[i];
  return 0;
}
}
