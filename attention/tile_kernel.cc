#include "attention/tile_kernel.h"

#include "base/cpu.h"

namespace kvrelay::attention {

TileKernelList UsableTileKernels() {
  TileKernelList list;
  list.kernels[list.count++] = {"portable", AttendTilePortable};
#if defined(__x86_64__)
  if (HasAvx2()) list.kernels[list.count++] = {"avx2", AttendTileAvx2};
  if (HasAvx512()) list.kernels[list.count++] = {"avx512", AttendTileAvx512};
#endif
  return list;
}

const TileKernel& BestTileKernel() {
  static const TileKernel best = [] {
    const TileKernelList list = UsableTileKernels();
    return list.kernels[list.count - 1];
  }();
  return best;
}

}  // namespace kvrelay::attention
