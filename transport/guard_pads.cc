#include "transport/guard_pads.h"

#include <sys/mman.h>

#include <utility>

namespace kvrelay::transport {

Result<std::unique_ptr<GuardPads>> GuardPads::Create(std::shared_ptr<UcxContext> context,
                                                     size_t pads) {
  KVRELAY_ASSIGN_OR_RETURN(Mapping mapping, Mapping::Map(pads * kPadBytes, PROT_READ | PROT_WRITE,
                                                         MAP_PRIVATE | MAP_ANONYMOUS, -1));
  std::unique_ptr<GuardPads> made(new GuardPads(std::move(mapping)));
  std::byte* first = made->mapping_.data();
  KVRELAY_ASSIGN_OR_RETURN(made->memory_,
                           UcxMemory::Register(std::move(context), {first, pads * kPadBytes}));
  for (size_t i = pads; i > 0; --i) made->free_.push_back(first + (i - 1) * kPadBytes);
  return made;
}

std::byte* GuardPads::Take() {
  if (free_.empty()) return nullptr;
  std::byte* pad = free_.back();
  free_.pop_back();
  return pad;
}

}  // namespace kvrelay::transport
