# Third-party libraries as targets kvrelay_deps::*, and what was found (shown by --version, see base/build_info.h).
# Names that differ among the supported distributions are hidden here. Installed too, for kvrelayConfig.cmake. UCX has its
# own file (KvrelayUcx).
include_guard(DIRECTORY)

find_package(PkgConfig REQUIRED)
find_package(Threads REQUIRED)
find_package(TBB REQUIRED CONFIG)
find_package(tl-expected REQUIRED CONFIG)
find_package(nlohmann_json REQUIRED CONFIG)
pkg_check_modules(GLOG REQUIRED IMPORTED_TARGET libglog)
pkg_check_modules(GFLAGS REQUIRED IMPORTED_TARGET gflags)
pkg_check_modules(SODIUM REQUIRED IMPORTED_TARGET libsodium)

# Its debug definitions ask the headers for checks that go with a debug libtbb, which the distributions do not have.
set_property(TARGET TBB::tbb PROPERTY INTERFACE_COMPILE_DEFINITIONS "")

add_library(kvrelay_deps::expected ALIAS tl::expected)
add_library(kvrelay_deps::tbb ALIAS TBB::tbb)
add_library(kvrelay_deps::json ALIAS nlohmann_json::nlohmann_json)
add_library(kvrelay_deps::glog ALIAS PkgConfig::GLOG)
add_library(kvrelay_deps::gflags ALIAS PkgConfig::GFLAGS)
add_library(kvrelay_deps::sodium ALIAS PkgConfig::SODIUM)

# libzmq and its C++ header (cppzmq). The header throws: who uses it catches. Only the version is taken from
# pkg-config, whose flags would bring in libzmq's own dependencies.
pkg_check_modules(ZMQ REQUIRED libzmq)
find_path(KVRELAY_CPPZMQ_INCLUDE zmq.hpp REQUIRED)
find_library(KVRELAY_ZMQ_LIBRARY zmq REQUIRED)
add_library(kvrelay_deps::zmq INTERFACE IMPORTED)
target_include_directories(kvrelay_deps::zmq SYSTEM INTERFACE "${KVRELAY_CPPZMQ_INCLUDE}")
target_link_libraries(kvrelay_deps::zmq INTERFACE "${KVRELAY_ZMQ_LIBRARY}")

# msgpack's C++ headers, without the part that needs Boost.
find_path(KVRELAY_MSGPACK_INCLUDE msgpack.hpp REQUIRED)
add_library(kvrelay_deps::msgpack INTERFACE IMPORTED)
target_compile_definitions(kvrelay_deps::msgpack INTERFACE MSGPACK_NO_BOOST MSGPACK_DISABLE_LEGACY_NIL)

# BLAS with the C interface (cblas.h). OpenBLAS is asked for by name: its thread count is set at run time.
pkg_check_modules(OPENBLAS QUIET openblas)
find_path(KVRELAY_OPENBLAS_INCLUDE cblas.h HINTS ${OPENBLAS_INCLUDE_DIRS}
          PATH_SUFFIXES openblas-pthread openblas REQUIRED)
find_library(KVRELAY_OPENBLAS_LIBRARY openblas HINTS ${OPENBLAS_LIBRARY_DIRS}
             PATH_SUFFIXES openblas-pthread REQUIRED)
add_library(kvrelay_deps::blas INTERFACE IMPORTED)
target_include_directories(kvrelay_deps::blas SYSTEM INTERFACE "${KVRELAY_OPENBLAS_INCLUDE}")
target_link_libraries(kvrelay_deps::blas INTERFACE "${KVRELAY_OPENBLAS_LIBRARY}")
