#include "base/numa.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <fstream>
#include <string>
#include <vector>

#include "base/mapping.h"
#include "tests/common/temp_dir.h"

namespace kvrelay {
namespace {

NumaTopology Machine(std::vector<NumaTopology::Node> nodes) {
  return {.nodes = std::move(nodes), .locate = nullptr};
}

// Two sockets whose numbers oneTBB gives the other way round.
const NumaTopology kTwo = Machine({{0, 1, 16}, {1, 0, 16}});

TEST(ShareByNode, EachPartGoesToTheProcessorsOfItsNode) {
  EXPECT_EQ(ShareByNode(kTwo, std::vector{0, 1, 1, 0, 1}),
            (std::vector<NodeShare>{{0, {0, 3}}, {1, {1, 2, 4}}}));
}

TEST(ShareByNode, AllOnOneNodeStaysThereThoughTheOtherIsIdle) {
  EXPECT_EQ(ShareByNode(kTwo, std::vector{1, 1, 1}), (std::vector<NodeShare>{{1, {0, 1, 2}}}));
}

TEST(ShareByNode, WhatIsNowhereOrOnANodeWithoutOurProcessorsIsForAny) {
  // Not there yet, node 7 is memory alone or outside of our affinity mask.
  EXPECT_EQ(ShareByNode(kTwo, std::vector{-2, 0, 7, 1, -14}),
            (std::vector<NodeShare>{{0, {1}}, {1, {3}}, {-1, {0, 2, 4}}}));
  EXPECT_EQ(ShareByNode(kTwo, std::vector{-1, -1}), (std::vector<NodeShare>{{-1, {0, 1}}}));
}

TEST(ShareByNode, AFewProcessorsOfANodeAreNotLeftAloneWithAllItsWork) {
  const NumaTopology thin = Machine({{0, 0, 1}, {1, 1, 31}});
  EXPECT_EQ(ShareByNode(thin, std::vector{0, 0, 0, 0}),
            (std::vector<NodeShare>{{-1, {0, 1, 2, 3}}}));
  // One of 32 parts is not more than the one processor's due.
  std::vector<int> located(32, 1);
  located[5] = 0;
  const std::vector<NodeShare> shares = ShareByNode(thin, located);
  ASSERT_EQ(shares.size(), 2U);
  EXPECT_EQ(shares[0], (NodeShare{0, {5}}));
  EXPECT_EQ(shares[1].parts.size(), 31U);
}

TEST(ShareByNode, OfEqualNodesEachDoesItsOwnHoweverSmall) {
  const NumaTopology small = Machine({{0, 0, 2}, {1, 1, 2}});
  EXPECT_EQ(ShareByNode(small, std::vector{1, 1}), (std::vector<NodeShare>{{1, {0, 1}}}));
  // A quarter of the processors would take four times as long, and are too few to fill the memory.
  const NumaTopology four = Machine({{0, 0, 2}, {1, 1, 2}, {2, 2, 2}, {3, 3, 2}});
  EXPECT_EQ(ShareByNode(four, std::vector{2, 2}), (std::vector<NodeShare>{{-1, {0, 1}}}));
  const NumaTopology large = Machine({{0, 0, 8}, {1, 1, 8}, {2, 2, 8}, {3, 3, 8}});
  EXPECT_EQ(ShareByNode(large, std::vector{2, 2}), (std::vector<NodeShare>{{2, {0, 1}}}));
}

TEST(ShareByNode, NothingToDoIsNobodys) { EXPECT_TRUE(ShareByNode(kTwo, {}).empty()); }

TEST(Numa, SeveralNodesAreToldFromOne) {
  const tests::TempDir dir;
  const std::string file = dir.path() + "/online";
  const auto says = [&](const std::string& text) {
    std::ofstream(file) << text;
    return NamesSeveralNodes(file);
  };
  EXPECT_FALSE(says("0\n"));
  EXPECT_TRUE(says("0-1\n"));
  EXPECT_TRUE(says("0,8\n"));
  EXPECT_FALSE(says(""));
  EXPECT_FALSE(NamesSeveralNodes(dir.path() + "/nothing"));
}

TEST(Numa, APageIsLocatedOnceItHasMemory) {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const Mapping two =
      Mapping::Map(2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1).value();
  two.data()[0] = std::byte{1};
  const std::vector<const void*> pages = {two.data() + 100, two.data() + page, nullptr};
  std::vector<int> nodes(3, 99);
  LocatePages(pages, nodes);
  EXPECT_LT(nodes[1], 0);
  EXPECT_LT(nodes[2], 0);
  if (nodes[0] == -1) GTEST_SKIP() << "this kernel does not tell where pages are (move_pages)";
  EXPECT_GE(nodes[0], 0);
}

}  // namespace
}  // namespace kvrelay
