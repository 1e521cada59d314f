// w3 of a lease record: a keyed hash of what the lease promises, so that a reader that was given
// another table, prompt or length than the record was started with accepts nothing.
#pragma once

#include <cstdint>
#include <span>

#include "base/hash.h"
#include "base/ids.h"
#include "kvcache/plan_pull.h"

namespace kvrelay::agent {

uint64_t TableHash(const HashKey& key, std::span<const KvTable> tables, const ContentHash& hash,
                   uint32_t first_token, uint32_t tokens);

}  // namespace kvrelay::agent
