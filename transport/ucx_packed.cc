#include "transport/ucx_packed.h"

#include <utility>

#include "transport/packed_rail.h"
#include "transport/striped.h"
#include "transport/ucx_carrier.h"

namespace kvrelay::transport {

Result<std::unique_ptr<Transport>> CreateUcxRail(Options options) {
  KVRELAY_ASSIGN_OR_RETURN(std::unique_ptr<PackedCarrier> carrier,
                           CreateUcxCarrier(options.data_interface, options.chunk_bytes));
  return CreatePackedRail(std::move(options), std::move(carrier));
}

Result<std::unique_ptr<Transport>> CreateUcxPacked(Options options) {
  return CreateStriped(options, CreateUcxRail);
}

}  // namespace kvrelay::transport
