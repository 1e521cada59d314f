# Language, warnings, optimisation, sanitizers, output folders: the same for every target.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

# Portable x86-64 code; kernels choose AVX2 and AVX-512 at run time through target attributes (base/cpu.h).
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -g1 -DNDEBUG")

# Two other levels, each for a folder and those below it: -O3 where loops over data are, and half the compile time for code
# that is much to compile and little to run (JSON, tests).
macro(kvrelay_compile_for_speed)
  set(CMAKE_UNITY_BUILD OFF)  # their sources differ in instruction sets, and in what the compiler inlines
  add_compile_options("$<$<AND:$<CONFIG:Release>,$<COMPILE_LANGUAGE:CXX>>:-O3>")
endmacro()
macro(kvrelay_compile_lightly)
  if(KVRELAY_SANITIZE)
    add_compile_options("${KVRELAY_SANITIZE_LIGHTLY}")
  else()
    add_compile_options("$<$<AND:$<CONFIG:Release>,$<COMPILE_LANGUAGE:CXX>>:-O1>")
  endif()
endmacro()

find_program(KVRELAY_CCACHE ccache)
if(KVRELAY_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER "${KVRELAY_CCACHE}")
  set(CMAKE_CXX_COMPILER_LAUNCHER "${KVRELAY_CCACHE}")
endif()

add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-fno-omit-frame-pointer>")
if(KVRELAY_WERROR)
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Werror>")
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Flow analysis after inlining: each version reports other things in std::vector and std::string that cannot be.
    foreach(warning array-bounds maybe-uninitialized stringop-overflow stringop-overread)
      add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wno-error=${warning}>")
    endforeach()
  endif()
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 reports overlapping and overlong copies inside std::string for `"literal" + string` (GCC bug 105651).
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict;-Wno-array-bounds>")
endif()

if(CMAKE_BUILD_TYPE STREQUAL "Debug")
  add_compile_definitions(_GLIBCXX_ASSERTIONS)
endif()

if(KVRELAY_SANITIZE)
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-fsanitize=${KVRELAY_SANITIZE};-fno-sanitize-recover=all>")
  add_link_options("-fsanitize=${KVRELAY_SANITIZE}")
  # Null pointers are found all the same.
  set(KVRELAY_SANITIZE_LIGHTLY "$<$<COMPILE_LANGUAGE:CXX>:-O0>")
  if(KVRELAY_SANITIZE MATCHES "undefined")
    list(APPEND KVRELAY_SANITIZE_LIGHTLY
         "$<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize=null,alignment,object-size,vptr>")
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # Instrumented code confuses the flow analysis behind this warning.
    add_compile_options(-Wno-maybe-uninitialized)
    if(KVRELAY_SANITIZE MATCHES "thread")
      # TSan does not model std::atomic_thread_fence; the code that uses fences says so to TSan itself.
      add_compile_options(-Wno-tsan)
    endif()
  endif()
endif()

# Binaries run from the build tree through absolute paths and from an install or bundle through these.
set(CMAKE_INSTALL_RPATH "$ORIGIN/../lib/kvrelay:$ORIGIN/../lib")
# RPATH, not RUNPATH: it also holds for what the libraries themselves need, which the bundle carries along.
add_link_options(-Wl,--disable-new-dtags)
