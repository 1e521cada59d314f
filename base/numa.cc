#include "base/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace kvrelay {

void LocatePages(std::span<const void* const> pages, std::span<int> nodes) {
  std::ranges::fill(nodes, -1);
  // Without target nodes nothing is moved. What it writes before it fails is as good.
  (void)::syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0);
}

bool NamesSeveralNodes(const std::string& online) {
  std::ifstream file(online);
  std::string nodes;  // "0", "0-1", "0,2"
  return std::getline(file, nodes) && nodes.find_first_of("-,") != std::string::npos;
}

std::vector<NodeShare> ShareByNode(const NumaTopology& topology, std::span<const int> located) {
  const size_t any = topology.nodes.size();
  std::vector<NodeShare> shares(any + 1);
  size_t threads = 0;
  for (size_t i = 0; i < any; ++i) {
    shares[i].node = static_cast<int>(i);
    threads += static_cast<size_t>(topology.nodes[i].threads);
  }
  const auto share_of = [&](int node) {
    const auto it = std::ranges::find(topology.nodes, node, &NumaTopology::Node::id);
    return static_cast<size_t>(it - topology.nodes.begin());
  };
  for (uint32_t part = 0; part < located.size(); ++part) {
    shares[share_of(located[part])].parts.push_back(part);
  }
  for (size_t i = 0; i < any; ++i) {
    const int own = topology.nodes[i].threads;
    // parts / own > 2 * all parts / all threads
    const bool slow =
        shares[i].parts.size() * threads > 2 * located.size() * static_cast<size_t>(own);
    if (own >= kThreadsThatFillANode || !slow) continue;
    std::vector<uint32_t>& from = shares[i].parts;
    shares[any].parts.insert(shares[any].parts.end(), from.begin(), from.end());
    from.clear();
  }
  std::ranges::sort(shares[any].parts);
  std::erase_if(shares, [](const NodeShare& share) { return share.parts.empty(); });
  return shares;
}

}  // namespace kvrelay
