# Included at the end of llama-cpp-python's CMakeLists.txt (engine.cmake): `loadstone_chat`, the chat code of llama.cpp
# behind the C interface of chat.cpp.

set(COMMON "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp/common")
include("${COMMON}/parsers/sources.cmake") # sets LLAMA_CHAT_PARSERS_SOURCES

set(SMALL_SOURCES
    ${LLAMA_CHAT_PARSERS_SOURCES}
    "${COMMON}/chat-auto-parser-generator.cpp"
    "${COMMON}/chat-auto-parser-helpers.cpp"
    "${COMMON}/chat-diff-analyzer.cpp"
    "${COMMON}/chat-peg-parser.cpp"
    "${COMMON}/chat.cpp")
set(OTHER_SOURCES
    "${LOADSTONE_NATIVE}/chat.cpp"
    "${COMMON}/common.cpp" # for six functions on strings and tokens; the linker drops the rest
    "${COMMON}/jinja/caps.cpp"
    "${COMMON}/jinja/lexer.cpp"
    "${COMMON}/jinja/parser.cpp"
    "${COMMON}/jinja/runtime.cpp"
    "${COMMON}/jinja/string.cpp"
    "${COMMON}/jinja/value.cpp"
    "${COMMON}/json-schema-to-grammar.cpp"
    "${COMMON}/json-schema.cpp"
    "${COMMON}/json.cpp"
    "${COMMON}/log.cpp"
    "${COMMON}/peg-parser.cpp"
    "${COMMON}/trie.cpp"
    "${COMMON}/unicode.cpp")

add_library(loadstone_chat SHARED ${SMALL_SOURCES} ${OTHER_SOURCES})
target_compile_features(loadstone_chat PRIVATE cxx_std_17)
target_include_directories(loadstone_chat PRIVATE "${COMMON}")
target_link_libraries(loadstone_chat PRIVATE llama vendor::nlohmann vendor::sheredom)
target_link_options(loadstone_chat PRIVATE LINKER:--gc-sections LINKER:--no-undefined)
target_compile_options(loadstone_chat PRIVATE -ffunction-sections -fdata-sections)

# The small sources spend most of their compile time on headers that they share: together, 19 CPU seconds instead of 72.
set_target_properties(loadstone_chat PROPERTIES
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    UNITY_BUILD ON
    UNITY_BUILD_BATCH_SIZE 17)
set_source_files_properties(${OTHER_SOURCES} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

get_directory_property(GGML_COMMIT DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp/ggml" DEFINITION GGML_BUILD_COMMIT)
set_source_files_properties("${LOADSTONE_NATIVE}/chat.cpp" PROPERTIES
    COMPILE_DEFINITIONS "LOADSTONE_GGML_COMMIT=\"${GGML_COMMIT}\"")

llama_cpp_python_install_target(loadstone_chat)

# llama.cpp's collection of chat templates, which the tests render.
install(DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp/models/templates"
    DESTINATION "${SKBUILD_PLATLIB_DIR}/llama_cpp/chat" FILES_MATCHING PATTERN "*.jinja")
