#include "base/random.h"

#include <glog/logging.h>
#include <sodium.h>

namespace kvrelay {

void RandomBytes(std::span<std::byte> out) {
  static const int initialised = sodium_init();  // 1 when somebody else (ZeroMQ) was first
  CHECK_GE(initialised, 0) << "libsodium finds no source of randomness";
  randombytes_buf(out.data(), out.size());
}

uint64_t Random64() {
  uint64_t value = 0;
  RandomBytes(std::as_writable_bytes(std::span(&value, 1)));
  return value;
}

Incarnation RandomIncarnation() {
  uint64_t value = 0;
  while (value == 0) value = Random64();
  return value;
}

uint64_t RandomFirstEpoch() {
  uint64_t value = 0;
  while (value == 0) value = Random64() >> 4;
  return value;
}

}  // namespace kvrelay
