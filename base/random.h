// Randomness that an attacker cannot guess (libsodium). Any thread. Simulations and samplers use
// their own seeded generators.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/ids.h"

namespace kvrelay {

void RandomBytes(std::span<std::byte> out);

uint64_t Random64();

// Random per process start, never 0.
Incarnation RandomIncarnation();

// Where an incarnation starts to count its epochs: 60 random bits, never 0. Counting up from here
// cannot overflow the 63 bits that a lease record has for the epoch.
uint64_t RandomFirstEpoch();

// LeaseId id = RandomId<LeaseId>(); never zero.
template <typename Id>
Id RandomId() {
  Id id;
  do {
    RandomBytes(std::as_writable_bytes(std::span(id.bytes)));
  } while (id.IsZero());
  return id;
}

}  // namespace kvrelay
