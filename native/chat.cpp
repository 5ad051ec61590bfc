// A C interface, with JSON in and out, over the chat code of llama.cpp (its directory `common`): templates, what they
// support, rendered prompts with their grammars, and parsers for what a model answers.
//
// llama.cpp has no such interface; its C++ headers are not installed and change with every commit.  So this file is
// compiled into the build of llama-cpp-python, beside the headers that it was written for (engine.cmake), and
// `loadstone_chat_commit` says which llama.cpp that was.  A caller compares it with the loaded `ggml_commit` before it
// calls anything else.
//
// Every text that is returned is allocated with malloc and belongs to the caller, who gives it to `loadstone_chat_free`;
// NULL means that there was no memory for it.  A result is a JSON object; `{"error": "..."}` says why there is none.
// No exception leaves a function.  A hostile template can still exhaust the stack or the memory, or run for ever
// (llama.cpp's Jinja has no limits): callers run this in a process that they can lose.

#include "chat.h"
#include "json-schema-to-grammar.h"
#include "json.h"
#include "log.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

using json = common_json;

namespace {

struct parser_state {
    common_chat_parser_params params;
};

char * text_of(const json & value) {
    return strdup(value.dump_safe().c_str());  // model output may end inside a UTF-8 sequence
}

char * error_of(const char * what) {
    json result   = json::object();
    result["error"] = std::string(what);
    return text_of(result);
}

template <typename F> char * guarded(F && make) {
    try {
        return text_of(make());
    } catch (const std::bad_alloc &) {
        return nullptr;
    } catch (const std::exception & error) {
        return error_of(error.what());
    } catch (...) {
        return error_of("llama.cpp threw something that is not an exception");
    }
}

json parse_object(const char * text) {
    json value = json::parse(text);
    if (!value.is_object()) {
        throw std::invalid_argument("the request must be a JSON object");
    }
    return value;
}

// Returns a member, or null where it is missing or null.
const json * member(const json & object, const char * key) {
    if (!object.contains(key)) {
        return nullptr;
    }
    const json & value = object.at(key);
    return value.is_null() ? nullptr : &value;
}

std::string string_member(const json & object, const char * key, const char * otherwise) {
    const json * value = member(object, key);
    if (value == nullptr) {
        return otherwise;
    }
    if (!value->is_string()) {
        throw std::invalid_argument(std::string("`") + key + "` must be a string");
    }
    return value->get<std::string>();
}

bool bool_member(const json & object, const char * key, bool otherwise) {
    const json * value = member(object, key);
    if (value == nullptr) {
        return otherwise;
    }
    if (!value->is_boolean()) {
        throw std::invalid_argument(std::string("`") + key + "` must be true or false");
    }
    return value->get<bool>();
}

// The order of common_grammar_trigger_type.
const char * trigger_name(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:        return "token";
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:         return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:      return "pattern";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL: return "pattern_full";
    }
    throw std::runtime_error("a grammar trigger of an unknown type");
}

common_chat_format format_named(const std::string & name) {
    for (int i = 0; i < COMMON_CHAT_FORMAT_COUNT; i++) {
        if (name == common_chat_format_name(static_cast<common_chat_format>(i))) {
            return static_cast<common_chat_format>(i);
        }
    }
    throw std::invalid_argument("`format` is no format of this llama.cpp: " + name);
}

// Makes the answer continue a last message of the assistant, as llama-server does (oaicompat_chat_params_parse).
void continue_answer(common_chat_templates_inputs & inputs) {
    const auto & messages = inputs.messages;
    const size_t n        = messages.size();
    if (n == 0 || messages[n - 1].role != "assistant") {
        if (inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE) {
            throw std::invalid_argument("`continue_final_message` needs a last message of the assistant");
        }
        return;
    }
    if (n >= 2 && messages[n - 2].role == "assistant") {
        throw std::invalid_argument("the last two messages must not both be the assistant's");
    }
    if (!messages[n - 1].tool_calls.empty()) {
        throw std::invalid_argument("a last message of the assistant cannot be continued if it has tool calls");
    }
    if (inputs.continue_final_message == COMMON_CHAT_CONTINUATION_NONE) {
        inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
    }
    inputs.add_generation_prompt = false;
}

common_chat_templates_inputs inputs_of(const json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    if (const json * tools = member(request, "tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(*tools);
    }
    inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(string_member(request, "tool_choice", "auto"));
    if (const json * schema = member(request, "json_schema")) {
        inputs.json_schema = schema->dump();
    }
    inputs.parallel_tool_calls   = bool_member(request, "parallel_tool_calls", false);
    inputs.add_generation_prompt = bool_member(request, "add_generation_prompt", true);
    const json * continuation = member(request, "continue_final_message");
    if (continuation != nullptr) {
        inputs.continue_final_message = common_chat_continuation_parse(*continuation);
    }
    const bool begins = bool_member(request, "add_generation_prompt", false) || (continuation != nullptr && *continuation == false);
    if (!begins) {
        continue_answer(inputs);
    }
    inputs.enable_thinking = bool_member(request, "enable_thinking", true);
    inputs.reasoning_format =
        common_reasoning_format_from_name(string_member(request, "reasoning_format", "deepseek"));
    if (const json * kwargs = member(request, "chat_template_kwargs")) {
        if (!kwargs->is_object()) {
            throw std::invalid_argument("`chat_template_kwargs` must be an object");
        }
        for (const auto & item : kwargs->items()) {
            inputs.chat_template_kwargs[item.key()] = item.value().dump();
        }
    }
    return inputs;
}

// What a template supports, as llama.cpp finds out by rendering it.
json capabilities_of(const common_chat_templates * templates) {
    json result = json::object();
    for (const auto & [name, supported] : common_chat_templates_get_caps(templates)) {
        result[name] = supported;
    }
    bool thinking = false;
    try {
        thinking = common_chat_templates_support_enable_thinking(templates);
    } catch (const std::exception &) {
        // It rejects the one message of this test.  What it makes of others, rendering them will tell.
    }
    result["supports_thinking"] = thinking;
    return result;
}

json json_of(const common_chat_params & params) {
    json triggers = json::array();
    for (const auto & trigger : params.grammar_triggers) {
        json entry     = json::object();
        entry["type"]  = std::string(trigger_name(trigger.type));
        entry["value"] = trigger.value;
        triggers.push_back(entry);
    }
    json result                 = json::object();
    result["prompt"]            = params.prompt;
    result["format"]            = std::string(common_chat_format_name(params.format));
    result["parser"]            = params.parser;
    result["generation_prompt"] = params.generation_prompt;
    result["grammar"]           = params.grammar;
    result["grammar_lazy"]      = params.grammar_lazy;
    result["triggers"]          = triggers;
    result["preserved_tokens"]  = params.preserved_tokens;
    result["stops"]             = params.additional_stops;
    result["thinking"]          = params.supports_thinking;
    result["thinking_start"]    = params.thinking_start_tag;
    result["thinking_ends"]     = params.thinking_end_tags;
    return result;
}

}  // namespace

// Returns the commit of llama.cpp that this library was compiled with, as `ggml_commit` spells it.  Not to be freed.
EXPORT const char * loadstone_chat_commit(void) {
    return LOADSTONE_GGML_COMMIT;
}

EXPORT void loadstone_chat_free(char * text) {
    free(text);
}

// Compiles a template: {"template": Jinja, "bos_token": "", "eos_token": ""}.  Sets *templates, which is freed with
// loadstone_chat_templates_free, and returns {"capabilities": {name: bool}}.
EXPORT char * loadstone_chat_templates(const char * request, void ** templates) {
    *templates = nullptr;
    return guarded([&] {
        const json        object = parse_object(request);
        const std::string source = string_member(object, "template", "");
        const std::string bos    = string_member(object, "bos_token", "");
        const std::string eos    = string_member(object, "eos_token", "");
        if (source.empty()) {
            throw std::invalid_argument("`template` must not be empty");  // llama.cpp would ask the model, and there is none
        }
        common_chat_templates_ptr compiled;
        try {
            compiled = common_chat_templates_init(nullptr, source, bos, eos);
        } catch (const std::exception &) {
            // common_chat_templates_init throws a sliced copy, without the message.
            common_chat_template(source, bos, eos);
            throw;
        }
        json result            = json::object();
        result["capabilities"] = capabilities_of(compiled.get());
        *templates             = compiled.release();
        return result;
    });
}

EXPORT void loadstone_chat_templates_free(void * templates) {
    common_chat_templates_free(static_cast<common_chat_templates *>(templates));
}

// Renders a conversation: {"messages", "tools", "tool_choice", "parallel_tool_calls", "json_schema",
// "add_generation_prompt", "continue_final_message", "enable_thinking", "reasoning_format", "chat_template_kwargs"}, each
// but the first optional, the first three as OpenAI's chat completions have them.  Returns the members of `json_of`.
EXPORT char * loadstone_chat_render(const void * templates, const char * request) {
    return guarded([&] {
        const json object = parse_object(request);
        return json_of(common_chat_templates_apply(static_cast<const common_chat_templates *>(templates), inputs_of(object)));
    });
}

// Converts a JSON schema to a GBNF grammar: {"grammar": GBNF}.
EXPORT char * loadstone_chat_grammar(const char * schema) {
    return guarded([&] {
        json result       = json::object();
        result["grammar"] = json_schema_to_grammar(json::parse(schema), /* force_gbnf= */ true);
        return result;
    });
}

// Makes a parser of what a model answers to a rendered prompt: {"format", "parser", "generation_prompt"} as
// loadstone_chat_render returned them, "reasoning_format" and "parse_tool_calls".  Sets *parser, which is freed with
// loadstone_chat_parser_free, and returns {}.
EXPORT char * loadstone_chat_parser(const char * request, void ** parser) {
    *parser = nullptr;
    return guarded([&] {
        const json object               = parse_object(request);
        auto       state                = std::make_unique<parser_state>();
        state->params.format            = format_named(string_member(object, "format", "Content-only"));
        state->params.generation_prompt = string_member(object, "generation_prompt", "");
        state->params.parse_tool_calls  = bool_member(object, "parse_tool_calls", true);
        state->params.reasoning_format =
            common_reasoning_format_from_name(string_member(object, "reasoning_format", "deepseek"));
        const std::string arena = string_member(object, "parser", "");
        if (!arena.empty()) {
            state->params.parser.load(arena);
        }
        *parser = state.release();
        return json::object();
    });
}

EXPORT void loadstone_chat_parser_free(void * parser) {
    delete static_cast<parser_state *>(parser);
}

// Parses `size` bytes of an answer, as far as it has come if `partial`.  Returns a message of OpenAI's chat
// completions: "content", "reasoning_content", "tool_calls".
EXPORT char * loadstone_chat_parse(const void * parser, const char * text, size_t size, bool partial) {
    return guarded([&] {
        const auto & params = static_cast<const parser_state *>(parser)->params;
        return common_chat_parse(std::string(text, size), partial, params).to_json_oaicompat();
    });
}

// Keeps llama.cpp's log quiet: it would start a thread and write whole answers to stderr.
__attribute__((constructor)) static void quieten(void) {
    common_log_set_verbosity_thold(-1);
}
