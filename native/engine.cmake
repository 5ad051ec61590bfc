# Included by CMake right after `project(llama_cpp)` of llama-cpp-python, through CMAKE_PROJECT_llama_cpp_INCLUDE
# (build.py).  Leaves out what Loadstone does not use, and adds the library `loadstone_chat`.

# tools/mtmd: images and sound.  A third of the compile time of llama.cpp's own code.
set(LLAVA_BUILD OFF)

# common: argument parser, downloads, HTTP client, sampling, speculation.  llama-cpp-python forces the cache entry on; a
# normal variable hides it (CMP0077, CMP0126).  `loadstone_chat` compiles the sources that it needs.
set(LLAMA_BUILD_COMMON OFF)

set(LOADSTONE_NATIVE "${CMAKE_CURRENT_LIST_DIR}")
cmake_language(EVAL CODE "cmake_language(DEFER CALL include [[${LOADSTONE_NATIVE}/chat.cmake]])")
