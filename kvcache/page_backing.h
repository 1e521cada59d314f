// Physical memory behind a range of addresses, page by page: what a virtual KV cache stands on. Of
// the host a sparse file (kvcache/sparse_memory.h), of GPUs CUDA's virtual memory management
// (kvcache/cuda/page_pool_cuda.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace kvrelay {

// Addresses for `bytes()`, of which pages get memory and lose it. One thread at a time.
class PageBacking {
 public:
  virtual ~PageBacking() = default;

  virtual std::byte* data() const = 0;
  virtual uint64_t bytes() const = 0;  // of addresses, whole pages
  virtual uint64_t page_bytes() const = 0;

  // Once, before Map: no more than `pages` have memory at a time. kResourceExhausted, with the
  // bytes asked and free, where there is not that much.
  virtual Status Reserve(uint64_t pages) = 0;
  // Gives `count` pages memory, from `first` on. They have none; their content is undefined.
  // kResourceExhausted: none of them has.
  virtual Status Map(uint64_t first, uint64_t count) = 0;
  // Takes the memory of those that have some. Nobody uses it any more. What could not be taken
  // shows in resident_bytes().
  virtual void Unmap(uint64_t first, uint64_t count) = 0;
  // Bytes of pages with memory, as the system counts them and not as they were mapped: on the host
  // a peer that reads a page without memory gives it some.
  virtual uint64_t resident_bytes() const = 0;
};

}  // namespace kvrelay
