// The `zmq-packed` transport.
#include <utility>

#include "transport/packed_rail.h"
#include "transport/striped.h"
#include "transport/zmq_carrier.h"

namespace kvrelay::transport {
namespace {

Result<std::unique_ptr<Transport>> CreateZmqRail(Options options) {
  KVRELAY_ASSIGN_OR_RETURN(
      std::unique_ptr<PackedCarrier> carrier,
      CreateZmqCarrier(options.data_interface, options.chunk_bytes, options.curve));
  return CreatePackedRail(std::move(options), std::move(carrier));
}

}  // namespace

Result<std::unique_ptr<Transport>> CreateZmqPacked(Options options) {
  return CreateStriped(options, CreateZmqRail);
}

}  // namespace kvrelay::transport
