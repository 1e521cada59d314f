// Which processors are near which memory (NUMA), and who therefore does what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvrelay {

// The machine as this process may use it. A value; the pure functions below decide by it.
struct NumaTopology {
  struct Node {
    int id = 0;       // the kernel's
    int binding = 0;  // oneTBB's number for it; -1: threads are bound to nothing
    int threads = 1;  // processors of it in the process's affinity mask, at least one
  };
  // Sets nodes[i] to the kernel's number of the node where the page at pages[i] lies; to less than
  // 0 when it has no memory yet, or the kernel does not tell. Touches no page.
  using Locate = void (*)(std::span<const void* const> pages, std::span<int> nodes);

  // Two at least; none where all memory is equally near.
  std::vector<Node> nodes;
  Locate locate = nullptr;
};

// NumaTopology::Locate by move_pages(2): about 0.2 us a page. Containers without CAP_SYS_NICE may
// be refused it, and get -1 each.
void LocatePages(std::span<const void* const> pages, std::span<int> nodes);

// Whether `online`, a file like /sys/devices/system/node/online, names more than one node.
bool NamesSeveralNodes(const std::string& online);

// Parts of some work that the same threads do.
struct NodeShare {
  int node = -1;  // index into NumaTopology::nodes; -1: threads of any node
  std::vector<uint32_t> parts;

  bool operator==(const NodeShare&) const = default;
};

// A node's processors do less than all of its work when they are fewer than this: some eight
// saturate the memory of a node.
inline constexpr int kThreadsThatFillANode = 8;

// Who does which of parts of about equal size; `located` says for each the kernel's number of the
// node of its memory. A part goes to the processors of its node. To any processor goes what is
// nowhere, or on a node of which we have no processor, or fewer than kThreadsThatFillANode that
// would take over twice as long as if all threads shared all parts: an affinity mask may leave us
// one processor of the node where all memory is. Shares are in the order of the nodes, the one of
// any processor last; empty ones are left out.
std::vector<NodeShare> ShareByNode(const NumaTopology& topology, std::span<const int> located);

}  // namespace kvrelay
