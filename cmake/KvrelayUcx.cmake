# Finds UCX and makes the target kvrelay_deps::ucx.
# Sets KVRELAY_UCX_VERSION (of the headers), KVRELAY_UCX_WHERE and, when UCX is not the system's, KVRELAY_UCX_LIBDIR.

set(default_root "${PROJECT_SOURCE_DIR}/third_party/ucx")
add_library(kvrelay_deps::ucx INTERFACE IMPORTED)

find_library(found_ucp NAMES ucp PATHS "${KVRELAY_UCX_ROOT}"
  PATH_SUFFIXES lib lib64 "lib/${CMAKE_LIBRARY_ARCHITECTURE}" NO_DEFAULT_PATH NO_CACHE)
if(found_ucp)
  get_filename_component(KVRELAY_UCX_LIBDIR "${found_ucp}" DIRECTORY)
  set(KVRELAY_UCX_WHERE "${KVRELAY_UCX_ROOT}")
  set(ucx_include "${KVRELAY_UCX_ROOT}/include")
  # Sites' own builds of UCX come in many shapes; three libraries and a header folder are all that we need of one.
  target_link_libraries(kvrelay_deps::ucx INTERFACE
    "${KVRELAY_UCX_LIBDIR}/libucp.so" "${KVRELAY_UCX_LIBDIR}/libuct.so" "${KVRELAY_UCX_LIBDIR}/libucs.so")
elseif(NOT KVRELAY_UCX_ROOT STREQUAL default_root)
  message(FATAL_ERROR "KVRELAY_UCX_ROOT=${KVRELAY_UCX_ROOT} has no libucp.so in its lib folder")
else()
  pkg_check_modules(SYSTEM_UCX QUIET ucx)
  find_path(ucx_include NAMES ucp/api/ucp.h HINTS ${SYSTEM_UCX_INCLUDE_DIRS} NO_CACHE)
  find_library(system_ucp NAMES ucp HINTS ${SYSTEM_UCX_LIBRARY_DIRS} NO_CACHE)
  if(NOT ucx_include OR NOT system_ucp)
    message(FATAL_ERROR "UCX is missing: run scripts/setup, or set KVRELAY_UCX_ROOT to a UCX installation")
  endif()
  set(KVRELAY_UCX_WHERE "system")
  set(KVRELAY_UCX_LIBDIR "")
  target_link_libraries(kvrelay_deps::ucx INTERFACE ucp uct ucs)
endif()
target_include_directories(kvrelay_deps::ucx SYSTEM INTERFACE "${ucx_include}")

file(STRINGS "${ucx_include}/ucp/api/ucp_version.h" lines REGEX "define UCP_API_(MAJOR|MINOR)")
string(REGEX REPLACE ".*UCP_API_MAJOR +([0-9]+).*UCP_API_MINOR +([0-9]+).*" "\\1.\\2" KVRELAY_UCX_VERSION "${lines}")
