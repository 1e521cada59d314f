# What `cmake --install` puts into a prefix, and the relocatable bundle that `cpack` makes.
#
#   bin/                    the programs; they find their libraries through $ORIGIN (KvrelayCompile)
#   lib/kvrelay/            UCX and its modules (lib/kvrelay/ucx), unless UCX is the system's; in the bundle also every
#                           other shared library that is not part of glibc
#   share/kvrelay/models/   the models that ship with the project
#   include/kvrelay/, lib/*.a, lib/cmake/kvrelay/   find_package(kvrelay); not in the bundle
#
# Components: runtime, development, bundle (in no plain install).

include(CMakePackageConfigHelpers)

get_property(programs GLOBAL PROPERTY KVRELAY_PROGRAMS)
get_property(libraries GLOBAL PROPERTY KVRELAY_LIBRARIES)
list(REMOVE_ITEM libraries kvrelay_tools)

# --- runtime

if(programs)
  install(TARGETS ${programs} RUNTIME DESTINATION bin COMPONENT runtime)
endif()
install(FILES LICENSE DESTINATION share/doc/kvrelay COMPONENT runtime OPTIONAL)

if(KVRELAY_UCX_LIBDIR)
  install(DIRECTORY "${KVRELAY_UCX_LIBDIR}/" DESTINATION lib/kvrelay COMPONENT runtime
          USE_SOURCE_PERMISSIONS
          FILES_MATCHING PATTERN "libuc[mpst]*.so.*" PATTERN "perftest" EXCLUDE PATTERN "cmake" EXCLUDE
                         PATTERN "pkgconfig" EXCLUDE)
  # The CUDA runtime that the wheel's modules were linked with.
  file(GLOB cudart "${KVRELAY_UCX_LIBDIR}/../../libucx_cu13.libs/libcudart*")
  install(FILES ${cudart} DESTINATION lib/kvrelay COMPONENT runtime)
endif()

file(GLOB model_configs CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/models/*/config.json")
foreach(config IN LISTS model_configs)
  get_filename_component(model "${config}" DIRECTORY)
  install(DIRECTORY "${model}" DESTINATION share/kvrelay/models COMPONENT runtime)
endforeach()

# --- development

install(TARGETS ${libraries} EXPORT kvrelayTargets
        ARCHIVE DESTINATION lib COMPONENT development)
install(EXPORT kvrelayTargets NAMESPACE kvrelay:: DESTINATION lib/cmake/kvrelay COMPONENT development)
foreach(folder IN LISTS KVRELAY_FOLDERS)
  if(folder STREQUAL "tools")
    continue()
  endif()
  install(DIRECTORY "${folder}" DESTINATION include/kvrelay COMPONENT development
          FILES_MATCHING PATTERN "*.h")
endforeach()
configure_package_config_file(cmake/kvrelayConfig.cmake.in kvrelayConfig.cmake
                              INSTALL_DESTINATION lib/cmake/kvrelay)
write_basic_package_version_file(kvrelayConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/kvrelayConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/kvrelayConfigVersion.cmake"
              cmake/KvrelayDependencies.cmake
        DESTINATION lib/cmake/kvrelay COMPONENT development)

# --- bundle

if(programs)
  set(program_files)
  foreach(program IN LISTS programs)
    string(APPEND program_files " \"$<TARGET_FILE:${program}>\"")
  endforeach()
  string(REGEX REPLACE "\\.so.*$" ".a" KVRELAY_OPENBLAS_ARCHIVE "${KVRELAY_OPENBLAS_LIBRARY}")
  configure_file(cmake/bundle_libraries.cmake.in bundle_libraries.cmake.gen @ONLY)
  file(GENERATE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/bundle_libraries.cmake"
       INPUT "${CMAKE_CURRENT_BINARY_DIR}/bundle_libraries.cmake.gen")
  install(SCRIPT "${CMAKE_CURRENT_BINARY_DIR}/bundle_libraries.cmake" COMPONENT bundle EXCLUDE_FROM_ALL)
endif()

set(CPACK_GENERATOR TGZ)
set(CPACK_PACKAGE_NAME kvrelay)
set(CPACK_PACKAGE_VENDOR kvrelay)
set(CPACK_PACKAGE_FILE_NAME "kvrelay-${PROJECT_VERSION}-linux-${CMAKE_SYSTEM_PROCESSOR}")
set(CPACK_PACKAGE_DIRECTORY "${CMAKE_BINARY_DIR}/package")
set(CPACK_COMPONENTS_ALL runtime bundle)
set(CPACK_ARCHIVE_COMPONENT_INSTALL ON)
set(CPACK_COMPONENT_INCLUDE_TOPLEVEL_DIRECTORY ON)
set(CPACK_COMPONENTS_GROUPING ALL_COMPONENTS_IN_ONE)
set(CPACK_STRIP_FILES ON)
set(CPACK_THREADS 0)
include(CPack)
